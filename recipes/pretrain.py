#!/usr/bin/env python3
"""Recipe for pre-training a Performer encoder as a masked autoencoder.

Frames of unlabelled music are hidden and rebuilt from the others (Audio-MAE,
arXiv 2207.06405); the encoder then initialises a separator.

    python recipes/pretrain.py hparams/audio_mae.yaml \
        --data_folder=FOLDER --dataset=mixtures
    python recipes/train.py hparams/performer_mixit_mae.yaml \
        --data_folder=FOLDER --dataset=mixtures \
        --pretrained_encoder=results/audio_mae/1234/encoder

Results are in the yaml's output_folder; its encoder/ is ready to use.
"""

import os
import pathlib

# Threads that spin while they wait starve the loader workers beside them: on
# 2 busy CPU cores training was 7 times slower. Takes effect before torch loads.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

from trackformer_sb.cli import exit_unless_pair_fits, steady_console

steady_console()
exit_unless_pair_fits()

import speechbrain as sb
import torch
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger
from torch.nn import functional as F

from trackformer_sb import plots
from trackformer_sb.inference.features import PerformerFeatures
from trackformer_sb.training.brain import MusicBrain
from trackformer_sb.training.dataio import data_report, prepare_data
from trackformer_sb.training.experiment import load_experiment, run

logger = get_logger(__name__)

COLUMNS = ("reconstruction_loss", "explained_variance")


class Pretraining(MusicBrain):
    """Training of a masked autoencoder on songs, or on sums of two."""

    columns, curves = COLUMNS, plots.PRETRAINING_CURVES
    selection_metrics = ("explained_variance", "loss")

    def compute_forward(self, batch, stage):
        """Hides a part of the spectrograms and rebuilds it."""
        self.note_input(batch)
        mixtures = batch.to(self.device, non_blocking=True).mixtures.data
        if stage != sb.Stage.TRAIN and self.pairs.silent_share == 1.0:
            # in training a silent partner was drawn
            mixtures = mixtures[:, :1]
        if self.hparams.AudioMAE.mask_mode == "mix":
            spectrum, cover = (self.modules.stft(x) for x in mixtures.unbind(1))
        else:
            spectrum, cover = self.modules.stft(mixtures.sum(1)), None
        # masks of their own for each batch and rank, after a resume as well,
        # and the same ones whenever an item is evaluated
        place = (
            (1, self.pairs.rank, self.hparams.epoch_counter.current, self.step)
            if stage == sb.Stage.TRAIN
            else (0, len(self.rows))
        )
        generator = torch.Generator(spectrum.device)
        generator.manual_seed(self.draw_seed(*place))
        return self.modules.mae(spectrum, generator, cover)

    def compute_objectives(self, predictions, batch, stage):
        """Mean squared error, see ``AudioMAE``."""
        loss = predictions.loss.mean()
        if stage == sb.Stage.TRAIN:
            self.losses = {"reconstruction": loss.detach()}
        else:
            self.rows.append(self.measure(predictions, batch))
        return loss

    def measure(self, predictions, batch):
        """Measures one item: a row of test_results.csv."""
        if batch.lost[0]:
            # another segment took the place of the unreadable one, or it got
            # no partner
            return {"id": batch.id[0]}
        hidden = predictions.hidden[0]
        target = predictions.target[0][hidden]
        loss = F.mse_loss(predictions.prediction[0][hidden].float(), target)
        loss = loss.item()
        # what predicting the mean of the item would leave
        variance = target.var().item()
        if self.picture is None:
            self.picture = predictions
        return {
            "id": batch.id[0],
            "reconstruction_loss": loss,  # of what was hidden
            # none for silence
            "explained_variance": 1 - loss / variance if variance else None,
        }

    def reconstruction_figure(self):
        """Picture of the first readable item."""
        return plots.reconstruction_figure(
            self.picture.target[0],
            self.picture.prediction[0],
            self.picture.hidden[0],
            self.hparams.sample_rate,
            self.hparams.hop_length,
        )

    def log_picture(self, epoch):
        """One validation item in TensorBoard."""
        if self.picture is not None:
            self.tensorboard.add_figure(
                "reconstruction", self.reconstruction_figure(), epoch
            )

    def write_figures(self, folder):
        """Draws a test item."""
        plots.save_figure(
            self.reconstruction_figure(), folder / "reconstruction.png"
        )


def check_masking(hparams):
    """Refuses spans that do not fit into a segment, before anything runs."""
    mae = hparams["AudioMAE"]
    silent_share = hparams["pairs"].keywords["silent_share"]
    if mae.mask_mode == "mix" and silent_share > 0:
        raise ValueError(
            "silent_share: expected 0 with mask_mode mix, which hides music "
            f"under other music, got {silent_share}"
        )
    samples = round(hparams["segment_seconds"] * hparams["sample_rate"])
    frames = -(-samples // hparams["hop_length"])
    mae.draw_hidden(1, frames, torch.Generator())


def model_card(hparams, brain):
    """What the card of the exported encoder says of the run."""
    mae = hparams["AudioMAE"]
    return {
        "Training": {
            "dataset": hparams["dataset"],
            "segments": f"{hparams['segment_seconds']} s",
            "hidden": f"{100 * mae.mask_ratio:g} % in spans of "
            f"{mae.mask_span} frames ({mae.mask_mode})",
            "weight of what is visible": mae.visible_weight,
            "epochs": len(hparams["history"].epochs),
            "seed": hparams["seed"],
        },
        "Measured on the test songs": {
            name: f"{value:.3f}" for name, value in brain.averages().items()
        },
    }


def main(argv):
    """Pre-trains, evaluates and exports an encoder."""
    with load_experiment(argv, Pretraining.selection_metrics) as experiment:
        pretrain(experiment)


def pretrain(experiment):
    """Pre-trains, evaluates and exports an encoder."""
    hparams = experiment.hparams
    check_masking(hparams)
    prepare_data(hparams)
    sb.create_experiment_directory(**experiment.directory)
    brain = Pretraining(experiment)
    brain.redrawn = hparams["AudioMAE"]
    brain.train_and_test()
    folder = brain.folder / "encoder"
    splits = data_report(hparams)["splits"]
    heard = {
        name
        for split in ("train", "valid")
        for name in splits[split]["song_names"]
    }
    features = PerformerFeatures.of_recipe(
        pathlib.Path(hparams["output_folder"]) / "hyperparams.yaml",
        hparams["Features"],
        sorted(heard),
    )
    run_on_main(features.export, args=[folder, model_card(hparams, brain)])
    logger.info(f"encoder: {folder}")


if __name__ == "__main__":
    run(main)
