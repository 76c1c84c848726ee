"""The Brain that the recipes share: data, schedule, history, costs."""

import csv
import itertools
import json
import pathlib
import statistics
import time

import numpy as np
import speechbrain as sb
import torch
import yaml
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.sampler import ReproducibleRandomSampler
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import ddp_broadcast, if_main_process
from speechbrain.utils.logger import get_logger

from trackformer_sb import plots
from trackformer_sb.memory import peak_memory_mb
from trackformer_sb.objectives.metrics import SILENT_ENERGY
from trackformer_sb.training.costs import of_all_ranks, training_costs
from trackformer_sb.training.dataio import dataio_prep
from trackformer_sb.training.optimization import (
    clip_all_groups,
    frozen_epochs,
)

logger = get_logger(__name__)


@register_checkpoint_hooks
class MusicBrain(sb.Brain):
    """Training on pairs of mixtures, see ``trackformer_sb.data.mixtures``.

    A recipe adds ``compute_forward``, ``compute_objectives``, which sets
    ``losses`` in training and adds to ``rows``, and the methods below that
    raise NotImplementedError.

    Arguments
    ---------
    experiment : trackformer_sb.training.experiment.Experiment
        Its folder and the manifests of its music are there.

    Raises
    ------
    ValueError
        If an epoch has no optimizer step.
    """

    # of test_results.csv, and what else is averaged
    columns, more_averages = (), ()
    # columns of which higher is better; "loss" is the validation loss
    selection_metrics = ("loss",)
    # panels of the training curves
    curves = plots.CURVES
    # layers of parameters that were pre-trained and are trained apart
    pretrained = ()

    def __init__(self, experiment):
        hparams = experiment.hparams
        super().__init__(
            modules=hparams["modules"],
            opt_class=hparams["optimizer"],
            hparams=hparams,
            run_opts=experiment.run_opts,
            checkpointer=hparams["checkpointer"],
        )
        self.num_processes, rank = 1, 0
        if self.distributed_launch:
            self.num_processes = torch.distributed.get_world_size()
            rank = self.rank
        self.skipped, self.silent_songs, self.sounding = {}, set(), {}
        self.results_folder = pathlib.Path(hparams["output_folder"])
        curves = {}
        if self.debug and not self.debug_persistently:
            # a few batches must not replace the results of a run, and all
            # ranks need the same of SpeechBrain's temporary folders
            self.results_folder = self.results_folder / "debug"
            self.checkpointer.checkpoints_dir = pathlib.Path(
                ddp_broadcast(str(self.checkpointer.checkpoints_dir))
            )
            self.results_folder.mkdir(exist_ok=True)
            log = self.results_folder / "train_log.txt"
            hparams["train_logger"].save_file = str(log)
            curves = {"save_dir": str(self.results_folder / "tensorboard")}
        self.tensorboard = hparams["tensorboard_logger"](**curves)
        self.train_options = dict(hparams["train_loader_options"])
        self.eval_options = dict(hparams["eval_loader_options"])
        for options in (self.train_options, self.eval_options):
            # copied to a GPU faster and without a wait
            options["pin_memory"] = self.device_type == "cuda"
        self.datasets, self.pairs = dataio_prep(
            hparams, rank, self.num_processes
        )
        segments = self._sample_segments(hparams)
        self.num_batches, self.num_steps = self._count_steps(segments)
        # ranks start from equal weights but draw their own dropout
        torch.manual_seed(hparams["seed"] + rank)

    def _sample_segments(self, hparams):
        """Chooses the order of an epoch; returns how many segments it has."""
        train, options = self.datasets["train"], self.train_options
        segments, wanted = len(train), hparams["epoch_segments"]
        shuffled = options.pop("shuffle", False)
        if isinstance(train, torch.utils.data.IterableDataset):  # shards
            options["collate_fn"] = PaddedBatch
            # what this rank reads; all ranks read as much
            return segments * self.num_processes
        if wanted or shuffled:
            segments = min(segments, wanted or segments)
            # an order, and with fewer a set, of its own in each epoch; that of
            # SpeechBrain is the same for all seeds on several processes
            self.train_sampler = options["sampler"] = ReproducibleRandomSampler(
                train, seed=hparams["seed"], num_samples=segments
            )
        return segments

    def _count_steps(self, segments):
        """Batches of an epoch, and optimizer steps of the run."""
        size = self.train_options["batch_size"] * self.num_processes
        batches = segments // size
        steps = batches // self.grad_accumulation_factor
        if not steps:
            raise ValueError(
                f"batch_size and grad_accumulation_factor: {segments} training "
                f"segments are less than one step of "
                f"{size * self.grad_accumulation_factor}"
            )
        # SpeechBrain counts batches anew in each epoch
        steps *= self.hparams.number_of_epochs
        return batches, min(steps, self.optimizer_step_limit or steps)

    def train_and_test(self):
        """Fits, then evaluates the best checkpoint."""
        self.fit(
            self.hparams.epoch_counter,
            self.datasets["train"],
            self.datasets["valid"],
            train_loader_kwargs=self.train_options,
            valid_loader_kwargs=self.eval_options,
        )
        self.evaluate(
            self.datasets["test"],
            max_key="score",
            test_loader_kwargs=dict(self.eval_options),
        )

    def log_picture(self, epoch):
        """Shows one validation item in TensorBoard."""
        raise NotImplementedError

    def write_figures(self, folder):
        """Draws a test item."""
        raise NotImplementedError

    def more_results(self):
        """What else belongs in metrics.json."""
        return {}

    def prepare_stage(self):
        """Resets what is measured."""
        self.rows, self.picture = [], None

    def note_input(self, batch):
        """Names each unreadable file once, counts, and notes silent songs."""
        # a rank trains on segments of its own, but evaluates all
        counts = self.modules.training or if_main_process()
        for path, reason in itertools.chain(*batch.skipped) if counts else ():
            if path not in self.skipped:
                words = f"segments are skipped: {reason}"
                logger.warning(words, main_process_only=False)
            self.skipped[path] = self.skipped.get(path, 0) + 1
        energy = batch.mixtures.data[:, 0].var(-1, correction=0)
        for song, value in zip(batch.song, energy.tolist()):
            sounds = value > SILENT_ENERGY
            self.sounding[song] = self.sounding.get(song, False) or sounds

    def report_silent_songs(self):
        """Names the songs that were silent in a whole epoch, once.

        Raises
        ------
        ValueError
            If there was no sound at all in the epoch, or in what a training
            that ends within its first epoch was given.
        """
        whole = len(self.step_seconds) == self.num_batches
        if not whole and (self.debug or self.steps_before):
            # a few segments may all be rests
            return
        songs = {}
        # all ranks must come to the same end
        for sounding in of_all_ranks(self, self.sounding):
            for song, sounds in sounding.items():
                songs[song] = songs.get(song, False) or sounds
        if not any(songs.values()):
            raise ValueError(
                "data_folder: expected music, but all of its "
                f"{len(songs)} training songs are silent"
                + ("" if whole else ", as far as they were read")
            )
        if self.hparams.epoch_segments or not whole:
            # of a part of the segments those of one song may be rests
            return
        for song, sounds in songs.items():
            if not sounds and song not in self.silent_songs:
                self.silent_songs.add(song)
                logger.warning(f"the song {song} is silent")

    @mark_as_saver
    def save_progress(self, path):
        """What SpeechBrain saves, and the time that the epoch took so far."""
        super()._save(path)
        spent = {"processes": self.num_processes}
        if self.step:
            spent["seconds"] = time.monotonic() - self.started
            spent["waiting"] = self.waiting
        with open(path, "a", encoding="utf-8") as file:
            yaml.safe_dump(spent, file)

    @mark_as_loader
    def load_progress(self, path, end_of_epoch=True):
        """Goes on with what ``save_progress`` saved."""
        super()._recover(path, end_of_epoch)
        self.spent = yaml.safe_load(pathlib.Path(path).read_text("utf-8"))

    def on_fit_start(self):
        """Recovers, and judges anew whether training stops early."""
        self.spent = {}
        super().on_fit_start()
        before = self.spent.get("processes", self.num_processes)
        if before != self.num_processes:
            logger.warning(
                f"begun on {before} processes, now {self.num_processes}: the "
                "learning rate follows the number of steps, which is another"
            )
        counter = self.hparams.epoch_counter
        # what it recovered was judged by the patience of then; 0 is not judged
        counter.should_stop = (
            counter.current > counter.limit_warmup
            and counter.best_limit > 0
            and counter.current - counter.best_limit >= counter.limit_to_stop
        )

    def on_stage_start(self, stage, epoch=None):
        """Resets what is measured."""
        self.started = time.monotonic()
        self.prepare_stage()
        self.not_finite = 0
        if stage == sb.Stage.TRAIN:
            self.pairs.set_epoch(epoch, self.step)
            self.resumed_within = self.step > 0
            self.started -= self.spent.get("seconds", 0.0)
            self.waiting = self.spent.get("waiting", 0.0)
            self.spent = {}
            self.last_batch_end = time.monotonic()
            self.step_seconds = []
            self.sounding = {}
            self.steps_before = self.optimizer_step

    def check_gradients(self):
        """Skips an optimizer step if its gradients are not finite.

        With one wait for the device; SpeechBrain's own waits once a parameter.
        """
        gradients = [
            p.grad for p in self.modules.parameters() if p.grad is not None
        ]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            logger.warning(
                f"step {self.optimizer_step + 1}: skipped, its gradients are "
                "not finite"
            )
            self.modules.zero_grad(set_to_none=True)

    def update_average(self, loss, avg_loss):
        """Counts losses that are not finite, which an average leaves out."""
        if not self.modules.training:  # a step would wait for the device
            self.not_finite += not torch.isfinite(loss)
        return super().update_average(loss, avg_loss)

    def _should_save_intra_epoch_ckpt(self, *args):
        """Not between optimizer steps: a checkpoint has no gradients."""
        whole = self.step % self.grad_accumulation_factor == 0
        return whole and super()._should_save_intra_epoch_ckpt(*args)

    def on_fit_batch_start(self, batch, should_step):
        """Adds up the wait for data; seeds dropout, to go on with its own."""
        self.waiting += time.monotonic() - self.last_batch_end
        place = getattr(self, "rank", 0), self.hparams.epoch_counter.current
        torch.manual_seed(self.draw_seed(*place, self.step))

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Steps the schedule, redraws random features, logs the losses."""
        if should_step:
            self.lr_scheduler.step()
            interval = getattr(self.hparams, "redraw_interval", 0)
            if interval and self.optimizer_step % interval == 0:
                self.redraw_projections()
            if if_main_process():
                for name, value in self.losses.items():
                    self.tensorboard.writer.add_scalar(
                        f"step/{name}", value, self.optimizer_step
                    )
        now = time.monotonic()
        self.step_seconds.append(now - self.last_batch_end)
        self.last_batch_end = now

    def draw_seed(self, *place):
        """A seed for a place in the training."""
        seeds = np.random.SeedSequence([self.hparams.seed, *place])
        return int(seeds.generate_state(1)[0])

    def redraw_projections(self):
        """New random features, the same on all ranks and after a resume."""
        seed = self.draw_seed(self.optimizer_step)
        generator = torch.Generator().manual_seed(seed)
        self.redrawn.redraw_projections(generator)

    def init_optimizers(self):
        """Adds the learning rate schedule, a cosine over all steps."""
        super().init_optimizers()
        if self.pretrained:
            self.hparams.fine_tuning(self.optimizer, self.pretrained)
            counter = self.hparams.epoch_counter
            epoch_steps = self.num_batches // self.grad_accumulation_factor
            counter.limit_warmup = max(
                counter.limit_warmup,
                frozen_epochs(self.optimizer, self.num_steps, epoch_steps),
            )
        if len(self.optimizer.param_groups) > 1:
            # SpeechBrain clips the first group only
            clip_all_groups(self.optimizer, self.max_grad_norm)
            self.max_grad_norm = float("inf")
        self.lr_scheduler = self.hparams.lr_scheduler(
            self.optimizer, num_steps=self.num_steps
        )
        self.checkpointer.add_recoverable("lr_scheduler", self.lr_scheduler)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Logs, saves, and after the test writes all results."""
        seconds = time.monotonic() - self.started
        if stage == sb.Stage.TRAIN:
            self.report_silent_songs()
            # the first batch waits for the workers to start
            steps = self.step_seconds[1:] or self.step_seconds
            averages = self.known_averages()
            self.train_averages = {"loss": float(stage_loss), **averages}
            self.train_figures = {
                "epoch_seconds": seconds,
                "waiting_seconds": self.waiting,
                "step_seconds": statistics.median(steps) if steps else None,
            }
        elif stage == sb.Stage.VALID:
            # a run resumed after its last epoch has nothing left to train
            if (
                self.step_seconds
                or self.resumed_within
                or not self.has_scored_checkpoint()
            ):
                self.end_epoch(float(stage_loss), seconds, epoch)
        else:
            self.end_test(float(stage_loss))

    def has_scored_checkpoint(self):
        """Whether an epoch was finished before."""
        return self.checkpointer.find_checkpoint(max_key="score") is not None

    def averages(self):
        """Mean of each column over the items that have it, or None."""
        means = {}
        for name in (*self.columns, *self.more_averages):
            known = [row.get(name) for row in self.rows]
            known = [x for x in known if x is not None and np.isfinite(x)]
            means[name] = float(np.mean(known)) if known else None
        return means

    def known_averages(self):
        """The averages that there are."""
        return {k: v for k, v in self.averages().items() if v is not None}

    def end_epoch(self, valid_loss, seconds, epoch):
        """What follows a validation.

        Raises
        ------
        ValueError
            If a loss was not finite, before anything is saved.
        """
        if self.not_finite:
            raise ValueError(
                f"epoch {epoch}: the losses of {self.not_finite} of "
                f"{len(self.rows)} validation items are not finite, as of "
                "weights that grew without bound. Those of finished epochs "
                f"are in {self.checkpointer.checkpoints_dir}; train again in "
                "another output_folder, with a lower lr or in fp32"
            )
        averages = self.known_averages()
        rate = self.optimizer.param_groups[0]["lr"]
        self.hparams.history.add(
            epoch,
            **self.train_figures,
            step=self.optimizer_step,
            peak_memory_mb=peak_memory_mb(self.device),
            lr=rate,
            valid_loss=valid_loss,
            valid_seconds=seconds,
            **{f"train_{key}": x for key, x in self.train_averages.items()},
            **{f"valid_{name}": value for name, value in averages.items()},
        )
        meta = {"epoch": epoch, "lr": rate}
        seconds = self.train_figures["epoch_seconds"]
        train = {**self.train_averages, "seconds": seconds}
        valid = {"loss": valid_loss, **averages}
        # loggers act on the main process but are collective calls
        self.hparams.train_logger.log_stats(meta, train, valid)
        # by itself it would count from 1 again after a resume
        before = len(self.hparams.history.epochs) - 1
        self.tensorboard.global_step |= {
            "meta": before,
            "train": dict.fromkeys(train, before),
            "valid": dict.fromkeys(valid, before),
        }
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

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Loads the best checkpoint; there must be one."""
        if self.checkpointer.find_checkpoint(max_key=max_key) is None:
            raise FileNotFoundError(
                "nothing to evaluate: no checkpoint of a finished epoch in "
                f"{self.checkpointer.checkpoints_dir}"
            )
        super().on_evaluate_start(max_key=max_key, min_key=min_key)
        # the best checkpoint's history ends with its epoch
        self.tested_epoch = self.hparams.history.epochs[-1]
        latest = self.checkpointer.find_checkpoint()
        self.hparams.history.load(latest.paramfiles["history"])

    def end_test(self, test_loss):
        """What follows the test."""
        if self.not_finite:
            logger.warning(f"{self.not_finite} test items are not finite")
        self.hparams.train_logger.log_stats(
            {"epochs": len(self.hparams.history.epochs)},
            test_stats={"loss": test_loss, **self.known_averages()},
        )
        skipped = of_all_ranks(self, self.skipped)
        self.unreadable_segments = sum(sum(x.values()) for x in skipped)
        if if_main_process():
            self.write_results(test_loss)

    def write_results(self, test_loss):
        """Writes test_results.csv, metrics.json and the figures."""
        folder, averages = self.results_folder, self.averages()
        with open(
            folder / "test_results.csv", "w", newline="", encoding="utf-8"
        ) as file:
            writer = csv.DictWriter(
                file, ("id", *self.columns), extrasaction="ignore"
            )
            writer.writeheader()
            writer.writerows(self.rows)
            writer.writerow({"id": "avg", **averages})
        results = {
            **averages,
            "test_loss": test_loss,
            "test_items": len(self.rows),
            **self.more_results(),
            **training_costs(self),
        }
        text = json.dumps(results, indent=2)
        (folder / "metrics.json").write_text(text, encoding="utf-8")
        plots.save_figure(
            plots.training_curves(self.hparams.history, self.curves),
            folder / "figures" / "training_curves.png",
        )
        if self.picture is not None:
            self.write_figures(folder / "figures")
