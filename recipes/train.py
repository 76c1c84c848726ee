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

import csv
import json
import os
import pathlib
import resource
import sys
import time

# Threads that spin while they wait starve the loader workers beside them: on
# 2 busy CPU cores training was 7 times slower. Takes effect before torch loads.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.distributed import (
    ddp_broadcast,
    if_main_process,
    run_on_main,
)
from speechbrain.utils.logger import get_logger

from trackformer_sb.data.audio import UnreadableAudio
from trackformer_sb.data.catalogue import prepare
from trackformer_sb.data.mixtures import MixtureOfMixtures
from trackformer_sb.inference.export import export_separator
from trackformer_sb.inference.separation import separate
from trackformer_sb.nnet.transfer import load_pretrained_encoder
from trackformer_sb.objectives import metrics
from trackformer_sb.objectives.regularizers import (
    diversity_loss,
    sparsity_loss,
)
from trackformer_sb.training import figures
from trackformer_sb.training.arguments import load_hparams, parse_arguments

logger = get_logger(__name__)

COLUMNS = (
    "si_snr",
    "si_snri",
    "si_snri_grouped",
    "mixture_si_snr",
    "sdr",
    "mask_overlap",
    "effective_mask_count",
)


# Higher is better in all of them; "loss" is the validation loss.
SELECTION_METRICS = (
    "si_snr",
    "si_snri",
    "si_snri_grouped",
    "mixture_si_snr",
    "loss",
)


class Separation(sb.Brain):
    """MixIT training of any encoder, masknet and decoder."""

    def compute_forward(self, batch, stage):
        """Separates sums of mixtures, and in evaluation the first mixture.

        Returns
        -------
        est_source : torch.Tensor
            [batch, sources, time].
        est_mask : torch.Tensor
            [num_spks, batch, channels, frames].
        """
        self.note_input(batch)
        mixtures = batch.to(self.device).mixtures.data
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
        """MixIT, diversity and sparsity loss; in evaluation measures too."""
        mixtures = batch.mixtures.data
        est_source, est_mask = (
            predictions[0][: len(mixtures)],
            predictions[1][:, : len(mixtures)],
        )
        parts = {"mixit": self.hparams.loss(est_source, mixtures)[0]}
        if self.hparams.lambda_diversity:
            masks = est_mask.transpose(0, 1)
            parts["diversity"] = diversity_loss(masks)
        if self.hparams.lambda_sparsity:
            mix = mixtures.sum(1)
            parts["sparsity"] = sparsity_loss(est_source, mix)
        parts = {name: loss.mean() for name, loss in parts.items()}
        if stage == sb.Stage.TRAIN:
            self.losses = {k: v.detach() for k, v in parts.items()}
        else:
            self.rows.append(self.measure(predictions, batch, stage))
        return sum(
            loss * getattr(self.hparams, f"lambda_{name}", 1.0)
            for name, loss in parts.items()
        )

    def measure(self, predictions, batch, stage):
        """Measures one item: a row of test_results.csv."""
        if batch.skipped[0]:
            # another segment took the place of the unreadable one
            return {"id": batch.id[0]}
        mixtures, stems = batch.mixtures.data, batch.stems.data[0]
        est_source, est_mask = predictions
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

    def note_input(self, batch):
        """Names each unreadable file once, counts, and notes silent songs."""
        for skipped in batch.skipped:
            for path, reason in skipped:
                if path not in self.skipped:
                    logger.warning(f"segments are skipped: {reason}")
                self.skipped[path] = self.skipped.get(path, 0) + 1
        energy = batch.mixtures.data[:, 0].square().mean(-1)
        for song, value in zip(batch.song, energy.tolist()):
            sounds = value > metrics.SILENT_ENERGY
            self.sounding[song] = self.sounding.get(song, False) or sounds

    def report_silent_songs(self):
        """Names the songs that were silent in a whole epoch, once."""
        for song, sounds in self.sounding.items():
            if not sounds and song not in self.silent_songs:
                self.silent_songs.add(song)
                logger.warning(f"the song {song} is silent")

    def on_stage_start(self, stage, epoch=None):
        """Resets what is measured."""
        self.started = time.monotonic()
        self.rows, self.picture, self.silent_stems = [], None, 0
        if stage == sb.Stage.TRAIN:
            self.pairs.set_epoch(epoch)
            self.waiting, self.last_batch_end = 0.0, time.monotonic()
            self.sounding = {}

    def on_fit_batch_start(self, batch, should_step):
        """Adds up the time the step waited for its data."""
        self.waiting += time.monotonic() - self.last_batch_end

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Steps the schedule, redraws random features, logs the losses."""
        if should_step:
            if self.lr_scheduler.last_epoch < self.lr_scheduler.T_max:
                self.lr_scheduler.step()
            interval = getattr(self.hparams, "redraw_interval", 0)
            if interval and self.optimizer_step % interval == 0:
                self.redraw_projections()
            if if_main_process():
                for name, value in self.losses.items():
                    self.tensorboard.writer.add_scalar(
                        f"step/{name}", value, self.optimizer_step
                    )
        self.last_batch_end = time.monotonic()

    def redraw_projections(self):
        """New random features, the same on all ranks and after a resume."""
        seed = np.random.SeedSequence(
            [self.hparams.seed, self.optimizer_step]
        ).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        self.hparams.MaskNet.redraw_projections(generator)

    def init_optimizers(self):
        """Adds the learning rate schedule, a cosine over all steps."""
        super().init_optimizers()
        self.lr_scheduler = self.hparams.lr_scheduler(
            self.optimizer, T_max=self.num_steps
        )
        self.checkpointer.add_recoverable("lr_scheduler", self.lr_scheduler)

    def averages(self):
        """Mean of each column over the items that have it."""
        values = {
            name: [row[name] for row in self.rows if row.get(name) is not None]
            for name in COLUMNS
        }
        return {
            name: float(np.mean(column)) if column else None
            for name, column in values.items()
        }

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Logs, saves, and after the test writes all results."""
        seconds = time.monotonic() - self.started
        if stage == sb.Stage.TRAIN:
            self.report_silent_songs()
            self.train_figures = {
                "train_loss": float(stage_loss),
                "epoch_seconds": seconds,
                "waiting_seconds": self.waiting,
            }
        elif stage == sb.Stage.VALID:
            self.end_epoch(float(stage_loss), seconds, epoch)
        else:
            self.end_test(float(stage_loss))

    def end_epoch(self, valid_loss, seconds, epoch):
        """What follows a validation."""
        averages = {
            name: value
            for name, value in self.averages().items()
            if value is not None
        }
        rate = self.optimizer.param_groups[0]["lr"]
        self.hparams.history.add(
            epoch,
            **self.train_figures,
            lr=rate,
            valid_loss=valid_loss,
            valid_seconds=seconds,
            **{f"valid_{name}": value for name, value in averages.items()},
        )
        meta = {"epoch": epoch, "lr": rate}
        train = {
            "loss": self.train_figures["train_loss"],
            "seconds": self.train_figures["epoch_seconds"],
        }
        valid = {"loss": valid_loss, **averages}
        # loggers act on the main process but are collective calls
        self.hparams.train_logger.log_stats(meta, train, valid)
        self.tensorboard.log_stats(meta, train, valid)
        if if_main_process():
            self.log_picture(epoch)
        # one decision for all ranks: they would wait for one another forever
        score = ddp_broadcast(
            averages.get(self.hparams.selection_metric, -valid_loss)
        )
        self.hparams.epoch_counter.update_metric(score)
        self.checkpointer.save_and_keep_only(
            meta={"score": score, "epoch": epoch}, max_keys=["score"]
        )

    def log_picture(self, epoch):
        """One validation item in TensorBoard, to see and to hear."""
        if self.picture is None:
            return
        writer = self.tensorboard.writer
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
        return figures.separation_figure(
            **picture, sample_rate=self.hparams.sample_rate
        )

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Loads the best checkpoint; there must be one."""
        if self.checkpointer.find_checkpoint(max_key=max_key) is None:
            raise FileNotFoundError(
                "nothing to evaluate: no checkpoint of a finished epoch in "
                f"{self.checkpointer.checkpoints_dir}"
            )
        super().on_evaluate_start(max_key=max_key, min_key=min_key)
        # the best checkpoint's history ends with its epoch
        latest = self.checkpointer.find_checkpoint()
        self.hparams.history.load(latest.paramfiles["history"])

    def peak_memory(self):
        """Largest memory in use so far, in MB: the GPU's, or the process's."""
        if self.device_type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)

    def end_test(self, test_loss):
        """What follows the test."""
        averages = self.averages()
        self.hparams.train_logger.log_stats(
            {"items": len(self.rows)},
            test_stats={
                "loss": test_loss,
                **{k: v for k, v in averages.items() if v is not None},
            },
        )
        if if_main_process():
            self.write_results(test_loss, averages)

    def write_results(self, test_loss, averages):
        """Writes test_results.csv, metrics.json and the figures."""
        folder = self.results_folder
        with open(
            folder / "test_results.csv", "w", newline="", encoding="utf-8"
        ) as file:
            writer = csv.DictWriter(file, ("id", *COLUMNS))
            writer.writeheader()
            writer.writerows(self.rows)
            writer.writerow({"id": "avg", **averages})
        history = self.hparams.history
        _, epoch_seconds = history.series("epoch_seconds")
        results = {
            **averages,
            "test_loss": test_loss,
            "test_items": len(self.rows),
            "silent_stems_left_out": self.silent_stems,
            "unreadable_segments": sum(self.skipped.values()),
            "epochs": len(history.epochs),
            "epoch_seconds": (
                float(np.mean(epoch_seconds)) if epoch_seconds else None
            ),
            "total_seconds": (
                history.total("epoch_seconds") + history.total("valid_seconds")
            ),
            "waiting_for_data_seconds": history.total("waiting_seconds"),
            "peak_memory_mb": self.peak_memory(),
            "device": self.device,
            "num_parameters": sum(p.numel() for p in self.modules.parameters()),
            "history": history.epochs,
        }
        text = json.dumps(results, indent=2)
        (folder / "metrics.json").write_text(text, encoding="utf-8")
        figures.save_figure(
            figures.training_curves(history),
            folder / "figures" / "training_curves.png",
        )
        if self.picture is not None:
            figures.save_figure(
                self.separation_figure(), folder / "figures" / "test_item.png"
            )


def dataio_prep(hparams, rank):
    """Datasets of pairs of mixtures from the prepared manifests.

    Returns
    -------
    datasets : dict
        "train", "valid" and "test".
    pairs : MixtureOfMixtures
        What draws the training pairs; to be told the epoch.
    """
    folder = pathlib.Path(hparams["output_folder"]) / "manifests"
    datasets, train_pairs = {}, None
    for split in ("train", "valid", "test"):
        dataset = sb.dataio.dataset.DynamicItemDataset.from_json(
            folder / f"{split}.json"
        )
        training = {
            "rank": rank,
            "gain_db": hparams["gain_db"],
            "single_stem_share": hparams["single_stem_share"],
            "silent_share": hparams["silent_share"],
        }
        pairs = MixtureOfMixtures(
            dataset.data,
            hparams["sample_rate"],
            hparams["seed"],
            **(training if split == "train" else {"with_stems": True}),
        )
        dataset.add_dynamic_item(
            pairs, takes="id", provides=["mixtures", "stems", "skipped"]
        )
        dataset.add_dynamic_item(list, takes="tracks", provides="names")
        keys = ["id", "song", "mixtures", "skipped"]
        if split == "train":
            train_pairs = pairs
        else:
            keys += ["stems", "names"]
        dataset.set_output_keys(keys)
        datasets[split] = dataset
    return datasets, train_pairs


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
            if value is not None
        },
    }


def main(argv):
    """Trains, evaluates and exports a separator."""
    hparams_file, run_opts, overrides = parse_arguments(argv)
    hparams = load_hparams(hparams_file, overrides)
    if hparams["selection_metric"] not in SELECTION_METRICS:
        raise ValueError(
            f"selection_metric must be one of {', '.join(SELECTION_METRICS)}, "
            f"got {hparams['selection_metric']!r}"
        )
    # before anything of an earlier run is written over
    hparams["checkpointer"].check_fits()
    sb.utils.distributed.ddp_init_group(run_opts)
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    output_folder = pathlib.Path(hparams["output_folder"])
    run_on_main(
        prepare,
        kwargs={
            "data_folder": hparams["data_folder"],
            "dataset": hparams["dataset"],
            "manifest_folder": output_folder / "manifests",
            "segment_seconds": hparams["segment_seconds"],
            "segment_hop_seconds": hparams["segment_hop_seconds"],
            "split_ratio": hparams["split_ratio"],
            "seed": hparams["seed"],
            "sample_rate": hparams["sample_rate"],
            "test_folder": hparams["test_folder"],
            "test_dataset": hparams["test_dataset"],
        },
    )
    if hparams.get("pretrained_encoder"):
        load_pretrained_encoder(
            hparams["MaskNet"], hparams["pretrained_encoder"]
        )
    brain = Separation(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    if brain.max_grad_norm < 0:
        # SpeechBrain documents a negative norm as "off" but turns the
        # gradient around with it
        brain.max_grad_norm = float("inf")
    hparams["train_loader_options"]["pin_memory"] = brain.device_type == "cuda"
    rank = getattr(brain, "rank", 0)
    datasets, brain.pairs = dataio_prep(hparams, rank)
    brain.skipped, brain.silent_songs, brain.sounding = {}, set(), {}
    brain.results_folder = output_folder
    if brain.debug and not brain.debug_persistently:
        # a few batches must not replace the results of a training, and all
        # ranks need the same of SpeechBrain's temporary folders
        brain.results_folder = output_folder / "debug"
        brain.checkpointer.checkpoints_dir = pathlib.Path(
            ddp_broadcast(str(brain.checkpointer.checkpoints_dir))
        )
        brain.results_folder.mkdir(exist_ok=True)
    brain.tensorboard = hparams["tensorboard_logger"]()
    world = (
        torch.distributed.get_world_size() if brain.distributed_launch else 1
    )
    batches = len(datasets["train"]) // (hparams["batch_size"] * world)
    if not batches:
        raise ValueError(
            f"batch_size: {hparams['batch_size']} on {world} process(es) is "
            f"more than the {len(datasets['train'])} training segments"
        )
    # SpeechBrain counts batches anew in each epoch
    steps = batches // brain.grad_accumulation_factor
    if not steps:
        raise ValueError(
            f"grad_accumulation_factor: {brain.grad_accumulation_factor} is "
            f"more than the {batches} batches of an epoch"
        )
    steps *= hparams["number_of_epochs"]
    brain.num_steps = min(steps, brain.optimizer_step_limit or steps)
    # ranks start from equal weights but draw their own dropout
    torch.manual_seed(hparams["seed"] + rank)
    brain.fit(
        hparams["epoch_counter"],
        datasets["train"],
        datasets["valid"],
        train_loader_kwargs=hparams["train_loader_options"],
        valid_loader_kwargs=hparams["eval_loader_options"],
    )
    brain.evaluate(
        datasets["test"],
        max_key="score",
        test_loader_kwargs=dict(hparams["eval_loader_options"]),
    )
    run_on_main(
        export_separator,
        args=[
            output_folder / "hyperparams.yaml",
            dict(hparams["modules"]),
            brain.results_folder / "separator",
        ],
        kwargs={"metadata": model_card(hparams, brain)},
    )
    logger.info(f"separator: {brain.results_folder / 'separator'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError, ImportError, UnreadableAudio) as error:
        logger.debug("stopped", exc_info=True)
        message = f"{type(error).__name__}: {error}"
        if "Traceback" in message:
            # from a loader worker: the last line says what happened
            message = message.strip().splitlines()[-1]
        sys.exit(message)
