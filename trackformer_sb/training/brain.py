"""The Brain that the recipes share: data, schedule, history, costs."""

import csv
import itertools
import json
import math
import pathlib
import statistics
import time

import numpy as np
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.sampler import ReproducibleRandomSampler
from speechbrain.utils.distributed import (
    ddp_broadcast,
    get_rank,
    if_main_process,
)
from speechbrain.utils.logger import get_logger

from trackformer_sb import plots
from trackformer_sb.inference.measure import peak_memory_mb
from trackformer_sb.training.dataio import dataio_prep, share_batches
from trackformer_sb.training.optimization import clip_all_groups

logger = get_logger(__name__)


class ExperimentBrain(sb.Brain):
    """A Brain of an ``Experiment``, and its place among other processes."""

    def __init__(self, experiment):
        hparams = experiment.hparams
        super().__init__(
            modules=hparams["modules"],
            opt_class=hparams["optimizer"],
            hparams=hparams,
            run_opts=experiment.run_opts,
            checkpointer=hparams["checkpointer"],
        )
        self.rank, self.num_processes = get_rank() or 0, 1
        if self.distributed_launch:
            self.num_processes = torch.distributed.get_world_size()
        if self.debug and not self.debug_persistently:
            # of SpeechBrain's temporary folders all ranks need the same
            self.checkpointer.checkpoints_dir = pathlib.Path(
                ddp_broadcast(str(self.checkpointer.checkpoints_dir))
            )
        self.folder = pathlib.Path(hparams["output_folder"])
        # none beside the main process
        self.tensorboard = hparams["tensorboard_logger"]().writer

    def init_optimizers(self):
        """Clips all groups together: SpeechBrain clips the first one only."""
        super().init_optimizers()
        clip_all_groups(self.optimizer, self.max_grad_norm)
        self.max_grad_norm = math.inf

    def of_all_ranks(self, value):
        """List of a value of each rank; all ranks have to call it."""
        values = [value] * self.num_processes
        if self.distributed_launch:
            torch.distributed.all_gather_object(values, value)
        return values


class MusicBrain(ExperimentBrain):
    """Training on pairs of mixtures, see ``trackformer_sb.data.mixtures``.

    A recipe adds ``compute_forward``, ``compute_objectives``, which sets
    ``losses`` in training and adds to ``rows``, ``log_picture(epoch)`` for
    TensorBoard and ``write_figures(folder)`` of a test item. The folder of the
    experiment and the manifests of its music are there already.
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
        super().__init__(experiment)
        hparams, self.skipped = experiment.hparams, {}
        self.train_options = dict(hparams["train_loader_options"])
        self.eval_options = dict(hparams["eval_loader_options"])
        for options in (self.train_options, self.eval_options):
            options["worker_init_fn"] = share_batches
            # copied to a GPU faster and without a wait
            options["pin_memory"] = self.device_type == "cuda"
        self.datasets, self.pairs = dataio_prep(
            hparams, self.rank, self.num_processes
        )
        segments = self._sample_segments(hparams)
        self.num_batches, self.num_steps = self._count_steps(segments)
        # ranks start from equal weights but draw their own dropout
        torch.manual_seed(hparams["seed"] + self.rank)

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

    def more_results(self):
        """What else belongs in metrics.json."""
        return {}

    def note_input(self, batch):
        """Names each unreadable file once, and counts them."""
        # a rank trains on segments of its own, but evaluates all
        counts = self.modules.training or if_main_process()
        for path, reason in itertools.chain(*batch.skipped) if counts else ():
            if path not in self.skipped:
                words = f"segments are skipped: {reason}"
                logger.warning(words, main_process_only=False)
            self.skipped[path] = self.skipped.get(path, 0) + 1

    def on_fit_start(self):
        """Recovers, and judges anew whether training stops early."""
        super().on_fit_start()
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
        self.rows, self.picture, self.not_finite = [], None, 0
        if stage == sb.Stage.TRAIN:
            self.pairs.set_epoch(epoch, self.step)
            self.resumed = self.step > 0
            self.waiting = 0.0
            self.last_batch_end = time.monotonic()
            self.step_seconds = []

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
        epoch = self.hparams.epoch_counter.current
        torch.manual_seed(self.draw_seed(self.rank, epoch, self.step))

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Steps the schedule, redraws random features, logs the losses."""
        if should_step:
            self.lr_scheduler.step()
            interval = getattr(self.hparams, "redraw_interval", 0)
            if interval and self.optimizer_step % interval == 0:
                # the same on all ranks and after a resume
                seed = self.draw_seed(self.optimizer_step)
                generator = torch.Generator().manual_seed(seed)
                self.redrawn.redraw_projections(generator)
            if if_main_process():
                for name, value in self.losses.items():
                    self.tensorboard.add_scalar(
                        f"step/{name}", value, self.optimizer_step
                    )
        now = time.monotonic()
        self.step_seconds.append(now - self.last_batch_end)
        self.last_batch_end = now

    def draw_seed(self, *place):
        """A seed for a place in the training."""
        seeds = np.random.SeedSequence([self.hparams.seed, *place])
        return int(seeds.generate_state(1)[0])

    def init_optimizers(self):
        """Adds the learning rate schedule, a cosine over all steps."""
        super().init_optimizers()
        if self.pretrained:
            self.hparams.fine_tuning(self.optimizer, self.pretrained)
        self.lr_scheduler = self.hparams.lr_scheduler(
            self.optimizer, num_steps=self.num_steps
        )
        self.checkpointer.add_recoverable("lr_scheduler", self.lr_scheduler)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Logs, saves, and after the test writes all results."""
        seconds = time.monotonic() - self.started
        if stage == sb.Stage.TRAIN:
            # the first batch waits for the workers to start
            steps = self.step_seconds[1:] or self.step_seconds
            self.train_averages = {
                "loss": float(stage_loss),
                **self.averages(),
            }
            self.train_figures = {
                "epoch_seconds": seconds,
                "waiting_seconds": self.waiting,
                "step_seconds": statistics.median(steps) if steps else None,
            }
        elif stage == sb.Stage.VALID:
            # a run resumed after its last epoch has nothing left to train
            done = self.checkpointer.find_checkpoint(max_key="score")
            if self.step_seconds or self.resumed or not done:
                self.end_epoch(float(stage_loss), seconds, epoch)
        else:
            self.end_test(float(stage_loss))

    def averages(self):
        """Mean of each column over the items that have it."""
        means = {}
        for name in (*self.columns, *self.more_averages):
            known = [row.get(name) for row in self.rows]
            known = [x for x in known if x is not None and np.isfinite(x)]
            if known:
                means[name] = float(np.mean(known))
        return means

    def end_epoch(self, valid_loss, seconds, epoch):
        """Logs and saves, but raises ValueError if losses are not finite."""
        if self.not_finite:
            raise ValueError(
                f"epoch {epoch}: the losses of {self.not_finite} of "
                f"{len(self.rows)} validation items are not finite, as of "
                "weights that grew without bound. Those of finished epochs "
                f"are in {self.checkpointer.checkpoints_dir}; train again in "
                "another output_folder, with a lower lr or in fp32"
            )
        averages = self.averages()
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
        if if_main_process():
            self.tensorboard.add_scalar("lr", rate, epoch)
            for split, stats in (("train", train), ("valid", valid)):
                for name, value in stats.items():
                    self.tensorboard.add_scalar(f"{name}/{split}", value, epoch)
            if not self.debug:  # pictures take longer than a few batches
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
            test_stats={"loss": test_loss, **self.averages()},
        )
        skipped = self.of_all_ranks(self.skipped)
        self.unreadable_segments = sum(sum(x.values()) for x in skipped)
        if if_main_process():
            self.write_results(test_loss)

    def costs(self):
        """What the training took, and its history, for metrics.json."""
        history = self.hparams.history
        epoch, valid, waiting, batch, steps, peaks = (
            history.series(name)[1]
            for name in (
                *("epoch_seconds", "valid_seconds", "waiting_seconds"),
                *("step_seconds", "step", "peak_memory_mb"),
            )
        )
        return {
            "unreadable_segments": self.unreadable_segments,
            "epochs": len(history.epochs),
            "batches": self.num_batches,
            "steps": int(steps[-1]),
            # none of a run that was killed in its last validation
            "step_seconds": statistics.median(batch) if batch else None,
            "epoch_seconds": statistics.fmean(epoch),
            "total_seconds": sum(epoch) + sum(valid),
            "waiting_for_data_seconds": sum(waiting),
            # of a training in several parts
            "peak_memory_mb": max([peak_memory_mb(self.device), *peaks]),
            "device": self.device,
            "num_parameters": sum(p.numel() for p in self.modules.parameters()),
            "history": history.epochs,
        }

    def write_results(self, test_loss):
        """Writes test_results.csv, metrics.json and, no debug run, figures."""
        folder = self.folder
        averages = dict.fromkeys((*self.columns, *self.more_averages))
        averages |= self.averages()
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
            **self.costs(),
        }
        text = json.dumps(results, indent=2)
        (folder / "metrics.json").write_text(text, encoding="utf-8")
        if self.debug:
            return
        plots.save_figure(
            plots.training_curves(self.hparams.history, self.curves),
            folder / "figures" / "training_curves.png",
        )
        if self.picture is not None:
            self.write_figures(folder / "figures")
