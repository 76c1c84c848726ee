#!/usr/bin/env python3
"""Recipe for training a music separator with MixIT, without labelled stems.

Two mixtures are added, the separator splits their sum, and each output is
given to the mixture it explains best (arXiv 2006.12701).

    python recipes/train.py hparams/performer_mixit.yaml
    python recipes/train.py hparams/performer_mixit.yaml \
        --data_folder=FOLDER --dataset=mixtures --segment_seconds=10
    torchrun --nproc_per_node=2 recipes/train.py hparams/performer_mixit.yaml

Results are in the yaml's output_folder; its separator/ is ready to use.
"""

import os
import pathlib

# Threads that spin while they wait starve the loader workers beside them: on
# 2 busy CPU cores training was 7 times slower. Takes effect before torch loads.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

from trackformer_sb.cli import exit_unless_pair_fits, steady_console

steady_console()
exit_unless_pair_fits()

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from trackformer_sb import plots
from trackformer_sb.data.manifest import read_songs
from trackformer_sb.data.remix import sum_by_class
from trackformer_sb.inference.features import (
    encoder_layers,
    load_pretrained_encoder,
)
from trackformer_sb.inference.separation import separate
from trackformer_sb.inference.separator import Separator
from trackformer_sb.objectives import metrics
from trackformer_sb.objectives.mixit import mixit_loss
from trackformer_sb.objectives.regularizers import (
    diversity_loss,
    mask_count_loss,
    sparsity_loss,
)
from trackformer_sb.training import named
from trackformer_sb.training.brain import MusicBrain
from trackformer_sb.training.dataio import manifest_folder, prepare_data
from trackformer_sb.training.experiment import load_experiment, run

logger = get_logger(__name__)

COLUMNS = (
    "si_snr",
    "si_snri",
    "si_snri_grouped",
    "mixture_si_snr",
    "sdr",
    "si_sdr",
    "mask_overlap",
    "effective_mask_count",
    *["pesq"] * metrics.HAS_PESQ,
)
MEASURED_EVERY = 10  # batches of a training


class Separation(MusicBrain):
    """MixIT training of any encoder, masknet and decoder."""

    columns, more_averages = COLUMNS, ("mixit_loss",)
    selection_metrics = (
        "si_snr",
        "si_snri",
        "si_snri_grouped",
        "mixture_si_snr",
        "loss",
    )

    def compute_forward(self, batch, stage):
        """Separates sums of mixtures, and in evaluation the first mixture.

        Returns sources [batch, sources, time] and masks [num_spks, batch,
        channels, frames].
        """
        self.note_input(batch)
        mixtures = batch.to(self.device, non_blocking=True).mixtures.data
        mix = mixtures.sum(1)
        if stage != sb.Stage.TRAIN and batch.stems.data.shape[1]:
            # with known stems the single song is separated as well
            mix = torch.cat([mix, mixtures[:, 0]])
        return separate(
            mix,
            self.modules.encoder,
            self.modules.masknet,
            self.modules.decoder,
            self.hparams.mixture_consistency,
        )

    def compute_objectives(self, predictions, batch, stage):
        """MixIT and the losses beside it; in evaluation measures too."""
        mixtures = batch.mixtures.data
        est_source, est_mask = (
            predictions[0][: len(mixtures)],
            predictions[1][:, : len(mixtures)],
        )
        parts = {"mixit": self.hparams.loss(est_source, mixtures)[0]}
        masks = est_mask.transpose(0, 1)
        if self.hparams.lambda_diversity:
            parts["diversity"] = diversity_loss(masks)
        if self.hparams.lambda_mask_count:
            parts["mask_count"] = mask_count_loss(masks)
        if self.hparams.lambda_sparsity:
            mix = mixtures.sum(1)
            parts["sparsity"] = sparsity_loss(est_source, mix)
        parts = {name: loss.mean() for name, loss in parts.items()}
        if stage == sb.Stage.TRAIN:
            self.losses = {k: v.detach() for k, v in parts.items()}
            if self.step % MEASURED_EVERY == 1:
                self.measure_training(est_source, mixtures)
        else:
            row = self.measure(predictions, batch, stage)
            if not batch.lost[0]:
                row["mixit_loss"] = parts["mixit"].item()
            self.rows.append(row)
        return sum(
            loss * getattr(self.hparams, f"lambda_{name}", 1.0)
            for name, loss in parts.items()
        )

    @torch.no_grad()
    def measure_training(self, est_source, mixtures):
        """Mixture SI-SNR of the pairs of a batch, whose mixtures all sound.

        As ``metrics.mixture_si_snr``, in single precision for half its cost.
        """
        loss, _ = mixit_loss(est_source, mixtures, "si_snr")
        sounding = mixtures.var(-1, correction=0) > metrics.SILENT_ENERGY
        values = -loss[sounding.all(1)]
        self.rows += [{"mixture_si_snr": x} for x in values.tolist()]

    def measure(self, predictions, batch, stage):
        """Measures one item: a row of test_results.csv."""
        mixtures, stems = batch.mixtures.data, batch.stems.data[0]
        est_source, est_mask = predictions
        if batch.lost[0] or not est_source.isfinite().all():
            # another segment took the place of the unreadable one, it got no
            # partner, or the separator failed
            return {"id": batch.id[0]}
        est_source = est_source.float()
        masks = est_mask[:, :1].transpose(0, 1)
        row = {
            "id": batch.id[0],
            "mixture_si_snr": metrics.mixture_si_snr(
                est_source[:1], mixtures
            ).item(),
            "mask_overlap": metrics.mask_overlap(masks).item(),
            "effective_mask_count": metrics.effective_mask_count(masks).item(),
        }
        if len(stems):
            song, mix = est_source[1], mixtures[0, 0]
            row["si_snr"] = metrics.stem_si_snr(song, stems)
            row["si_snri"], silent = metrics.si_snri(song, stems, mix)
            if len(song) <= metrics.MAX_GROUPED:
                row["si_snri_grouped"], _ = metrics.si_snri_grouped(
                    song, stems, mix
                )
            self.silent_stems += silent
            if stage == sb.Stage.TEST:
                row["sdr"] = metrics.sdr(song, stems)
                row["si_sdr"] = metrics.si_sdr(song, stems)
                classes = sum_by_class(dict(zip(batch.names[0], stems)))
                if metrics.HAS_PESQ and "vocals" in classes:
                    row["pesq"] = metrics.pesq(
                        song, classes["vocals"], self.hparams.sample_rate
                    )
        row = {
            name: None
            if isinstance(value, float) and np.isnan(value)
            else value
            for name, value in row.items()
        }
        interest = sum(stem.square().mean() > 1e-6 for stem in stems)
        if self.picture is None or interest > self.picture["interest"]:
            show = -1 if len(stems) else 0
            self.picture = {
                "interest": interest,
                "mix": mixtures[0, 0] if len(stems) else mixtures[0].sum(0),
                "est_source": est_source[show],
                "est_mask": est_mask[:, show],
                "stems": stems,
                "names": batch.names[0],
            }
        return row

    def on_stage_start(self, stage, epoch=None):
        """Resets what is measured."""
        super().on_stage_start(stage, epoch)
        self.silent_stems = 0
        if stage == sb.Stage.TEST and not metrics.HAS_PESQ:
            logger.info(metrics.NO_PESQ)

    def log_picture(self, epoch):
        """One validation item in TensorBoard, to see and to hear."""
        if self.picture is None:
            return
        writer = self.tensorboard
        writer.add_figure("separation", self.separation_figure(), epoch)
        for name, sig in (
            ("mixture", self.picture["mix"].unsqueeze(0)),
            ("output", self.picture["est_source"]),
        ):
            for number, one in enumerate(sig):
                writer.add_audio(
                    f"{name} {number}",
                    one.detach().float().cpu().clamp(-1, 1),
                    epoch,
                    sample_rate=self.hparams.sample_rate,
                )

    def separation_figure(self):
        """Picture of the readable item with the most active stems."""
        picture = {k: v for k, v in self.picture.items() if k != "interest"}
        return plots.item_figure(
            **picture, sample_rate=self.hparams.sample_rate
        )

    def write_figures(self, folder):
        """Draws a test item."""
        plots.save_figure(self.separation_figure(), folder / "test_item.png")

    def more_results(self):
        """What else belongs in metrics.json."""
        names = ("train_mixture_si_snr", "valid_mixture_si_snr")
        return {
            **{name: self.tested_epoch.get(name) for name in names},
            "silent_stems_left_out": self.silent_stems,
            "test_songs_pretrained_on": self.songs_pretrained_on,
        }


def model_card(hparams, brain):
    """What the card of the exported separator says of the training."""
    return {
        "Training": {
            "dataset": hparams["dataset"],
            "segments": f"{hparams['segment_seconds']} s",
            "epochs": len(hparams["history"].epochs),
            "seed": hparams["seed"],
        },
        "Measured on the test songs": {
            name: f"{value:.2f}"
            for name, value in brain.averages().items()
            if name in COLUMNS
        },
    }


def initialise(hparams):
    """Loads the pre-trained encoder, if one is asked for.

    Returns the names of what it initialised, none where the encoder is gone
    and a checkpoint goes on without it, and the songs that it was trained on.
    """
    source = hparams.get("pretrained_encoder")
    if not source:
        return [], None
    try:
        features = load_pretrained_encoder(hparams["MaskNet"], source, hparams)
    except FileNotFoundError as error:
        if hparams["checkpointer"].find_checkpoint() is not None:
            # which takes the place of these weights
            return [], None
        raise FileNotFoundError(f"pretrained_encoder: {error}") from error
    return sorted(features.encoder.state_dict()), features.config["songs"]


def songs_heard(hparams, songs):
    """How many test songs a pre-training heard; warns of any.

    Songs go by their names, as of the same data folder.
    """
    if songs is None:
        return None
    tested = read_songs(manifest_folder(hparams), "test")
    heard = {line["song"] for line in tested} & set(songs)
    if heard:
        logger.warning(
            f"pretrained_encoder: its training had {len(heard)} of the test "
            f"songs: {', '.join(sorted(heard)[:5])} ... Test scores are "
            "optimistic: pre-train with the same seed, or test on a "
            "test_folder"
        )
    return len(heard)


def main(argv):
    """Trains, evaluates and exports a separator."""
    with load_experiment(argv, Separation.selection_metrics) as experiment:
        named_stems = "classes" in experiment.hparams
        (named.train if named_stems else train)(experiment)


def train(experiment):
    """Trains, evaluates and exports a separator of outputs without names."""
    hparams = experiment.hparams
    # before anything of an earlier run is written over
    keys, songs = initialise(hparams)
    prepare_data(hparams)
    sb.create_experiment_directory(**experiment.directory)
    source = hparams.get("pretrained_encoder")
    if keys:
        logger.info(f"{len(keys)} tensors from {source}: {', '.join(keys)}")
    elif source:
        logger.warning(
            f"pretrained_encoder: no encoder in {source}; going on from the "
            "checkpoint. Test songs that it was trained on are not counted"
        )
    brain = Separation(experiment)
    brain.redrawn = hparams["MaskNet"]
    brain.songs_pretrained_on = songs_heard(hparams, songs)
    if source and "fine_tuning" in hparams:
        brain.pretrained = encoder_layers(hparams["MaskNet"])
    brain.train_and_test()
    folder = brain.folder / "separator"
    separator = Separator.of_recipe(
        pathlib.Path(hparams["output_folder"]) / "hyperparams.yaml",
        hparams["modules"],
    )
    run_on_main(separator.export, args=[folder, model_card(hparams, brain)])
    logger.info(f"separator: {folder}")


if __name__ == "__main__":
    run(main)
