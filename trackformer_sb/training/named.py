"""Training of separators with named stems."""

import csv
import pathlib
import time

import numpy as np
import speechbrain as sb
import torch
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.utils.distributed import ddp_broadcast, if_main_process

from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import NamedWindows
from trackformer_sb.inference.separation import apply_masks, separate_by_both
from trackformer_sb.inference.separator import Separator, load_separator
from trackformer_sb.objectives.mixit import mixit_loss
from trackformer_sb.objectives.named import (
    absent_loss,
    named_loss,
    named_si_snri,
    pair_by_class,
)
from trackformer_sb.training import self_training
from trackformer_sb.training.brain import ExperimentBrain
from trackformer_sb.training.dataio import check_songs, share_batches

# MixIT's loss is in dB, that of named stems a distance of about 1
MIXIT_SHARE = 0.1
PROBES = 10  # steps of those between two lines of the log that are measured

# Shares of their class's energy over an epoch below which a slot is retired,
# and from which on it is busy.
UNUSED, BUSY = 0.01, 0.25
RETIRED = -1e4  # bias of a slot that is out of use; infinity has no average


def adapted_slots(active, energies):
    """Which slots the next epoch uses, from the `active` ones' energies.

    Both [classes, slots]. Unused slots are retired; a class whose slots are all
    busy gets another, if there is one; one that was silent stays as it was.

    Example
    -------
    >>> active = torch.tensor([[True, True, False], [True, True, False]])
    >>> energies = torch.tensor([[5.0, 4.0, 0.0], [9.0, 0.01, 0.0]])
    >>> adapted_slots(active, energies)
    tensor([[ True,  True,  True],
            [ True, False, False]])
    """
    share = energies / energies.sum(1, keepdim=True)  # NaN of silence
    kept = active & ~(share < UNUSED)
    full = ((share >= BUSY) | ~active).all(1, keepdim=True)
    first_free = (~active).cumsum(1).eq(1) & ~active
    return kept | (full & first_free)


@torch.no_grad()
def use_slots(masknets, active):
    """Retires slots, or takes them back with the bias of their class."""
    for masknet in masknets:
        # [classes, slots, freq, 1]
        biases = masknet.bin_bias.unflatten(0, active.shape)
        used = biases[..., 0, 0] > RETIRED / 2
        for bias, was, now in zip(biases, used, active.to(used.device)):
            bias[now & ~was] = bias[was].mean(0)
            bias[~now] = RETIRED


class NamedSeparation(ExperimentBrain):
    """Named stems where items have them, MixIT over all slots elsewhere.

    Made by ``train``, which gives it its datasets.
    """

    def encode(self, sig):
        """[..., time] -> complex [..., freq, frames]."""
        mix_w = self.modules.encoder(sig.flatten(0, -2))
        return mix_w.unflatten(0, sig.shape[:-1])

    def compute_forward(self, batch, stage):
        """Masks [num_spks, batch, freq, frames] and spectra of the mixtures."""
        if stage == sb.Stage.TRAIN:
            mix = batch[0].to(self.device).sum(1)
            songs = batch[0][~batch[1], :2].to(self.device)
            if len(songs) and self.teacher is not None:
                mix[~batch[1]] = self.teach(songs)
            mix_w = self.encode(mix)
            return self.modules.masknet(mix_w), mix_w
        ((stems, _),) = batch
        mix_w = self.encode(sum(stems.values()).to(self.device))[None]
        return self.hparams.ema.module(mix_w), mix_w

    def compute_objectives(self, predictions, batch, stage):
        """Mean over the items; in evaluation measures instead."""
        est_mask, mix_w = predictions
        if stage != sb.Stage.TRAIN:
            ((stems, group),) = batch
            self.rows.append((group, self.measure(est_mask, mix_w, stems)))
            return torch.zeros(())
        if self.slots_at_first:
            power = mix_w.abs().square().mean(1)
            slots = est_mask.detach().float().square() * power
            self.energies += slots.sum((1, 2, 3))
        stems = batch[0].to(self.device)
        named = batch[1].to(self.device)
        losses = {}
        if named.any():
            losses["named"] = named_loss(
                est_mask[:, named],
                mix_w[named],
                self.encode(stems[named]),
                self.hparams.sample_rate,
            )
        summed = ~named
        if summed.any() and self.teacher is not None:
            losses["teacher"] = named_loss(
                est_mask[:, ~named],
                mix_w[~named],
                self.encode(self.taught_stems),
                self.hparams.sample_rate,
            )
            summed[~named] = ~self.remixed
        if summed.any():
            masks = est_mask[:, summed].transpose(0, 1).unsqueeze(2)
            sep_w = apply_masks(mix_w[summed].unsqueeze(1), masks)
            # [batch, sources, 2, time]
            sources = self.modules.decoder(sep_w)[..., : stems.shape[-1]]
            mixtures = stems[summed, :2].flatten(2)
            loss, _ = mixit_loss(sources.flatten(2), mixtures)
            losses["mixit"] = MIXIT_SHARE * loss
        absent = batch[2].to(self.device)[summed]
        if absent.any():
            losses["absent"] = absent_loss(
                est_mask[:, summed],
                mix_w[summed],
                absent,
                self.hparams.sample_rate,
            )
        for name, loss in losses.items():
            self.sums.setdefault(name, []).append(loss.detach().mean())
        return sum(loss.sum() for loss in losses.values()) / len(named)

    @torch.no_grad()
    def teach(self, songs):
        """Mixtures of songs that a teacher hears, [batch, 2 songs, 2, time].

        Of an item the sum of its two songs, or their stems mixed anew. Leaves
        ``taught_stems``, [batch, classes, 2, time], by waveforms, for the
        teacher's STFT may be another one, and which items are ``remixed``.
        """
        rng = np.random.default_rng(
            (self.hparams.seed, self.optimizer_step, self.step, self.rank)
        )
        share = getattr(self.hparams, "remix_share", 0.0)
        remixed = torch.from_numpy(rng.random(len(songs)) < share)
        remixed = remixed.to(songs.device)
        mix = songs.sum(1)
        stems = mix.new_zeros(
            len(mix), len(self.hparams.classes), *mix.shape[1:]
        )
        if remixed.any():
            stems[remixed] = self_training.mixed_anew(
                *self_training.stems_and_agreement(
                    self.teacher, songs[remixed]
                ),
                self.hparams.confidence_db,
                rng,
            )
            mix[remixed] = stems[remixed].sum(1)
        if not remixed.all():
            heard = self.teacher(songs[~remixed].flatten(0, 1))
            stems[~remixed] = heard.unflatten(0, (-1, 2)).sum(1)
        self.taught_stems, self.remixed = stems, remixed
        return mix

    @torch.no_grad()
    def measure(self, est_mask, mix_w, stems):
        """Named SI-SNR improvement of an item.

        From masks [num_spks, 1, freq, frames], the mixture's spectrum
        [1, 2, freq, frames] and class -> stem [2, time]: class -> dB of the
        masks, and of their average over time.
        """
        est_mask, mix_w = est_mask.float(), mix_w[0].mean(0, keepdim=True)
        stems = {
            name: stem.mean(0, keepdim=True) for name, stem in stems.items()
        }
        mix, found = sum(stems.values()), []
        encoder, masknet = lambda sig: mix_w, lambda mix_w: est_mask
        decoder = self.modules.decoder
        for slots in separate_by_both(mix, encoder, masknet, decoder):
            names, est, true = pair_by_class(
                slots.cpu(), self.slot_classes, stems
            )
            found.append(named_si_snri(est[:, 0], true[:, 0], mix[0]))
        return dict(zip(names, torch.stack(found, 1).tolist()))

    def on_stage_start(self, stage, epoch=None):
        """Resets what is measured."""
        self.rows, self.started = [], time.monotonic()
        if stage == sb.Stage.TRAIN:
            self.items.set_epoch(epoch)
            self.sums, self.probes = {}, []
            # of a run that is resumed within an epoch, those of the rest
            self.energies = torch.zeros(
                self.hparams.num_spks, device=self.device
            )

    def on_fit_start(self):
        """Recovers; a decay that was asked for begins now."""
        super().on_fit_start()
        self.masknets = self.hparams.MaskNet, self.hparams.ema.module
        if self.slots_at_first and not self.optimizer_step:
            classes = len(self.hparams.classes)
            number = torch.arange(self.hparams.num_spks // classes)
            first = number < self.slots_at_first
            use_slots(self.masknets, first.expand(classes, -1))
        self.decay_began = self.begun = time.monotonic()
        _, hours = self.hparams.history.series("hours")
        self.hours_before = hours[-1] if hours else 0.0

    def rate(self):
        """Share of the learning rate: warm-up, constant, decay on demand."""
        share = min(1.0, (self.optimizer_step + 1) / self.hparams.warmup_steps)
        if self.hparams.finish_minutes:
            spent = (time.monotonic() - self.decay_began) / 60
            # one decision for all ranks
            left = ddp_broadcast(1 - spent / self.hparams.finish_minutes)
            if left <= 0:
                # this step and this epoch are the last
                self.optimizer_step_limit = self.optimizer_step + 1
                self.hparams.epoch_counter.limit = 0
            share *= max(0.0, left)
        return share

    def on_fit_batch_start(self, batch, should_step):
        """Sets the learning rate."""
        share = self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = self.hparams.lr * share

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Averages the weights, probes training items, logs."""
        if not should_step:
            return
        self.hparams.ema.update_parameters(self.hparams.MaskNet)
        step, interval = self.optimizer_step, self.hparams.log_steps
        if step % max(1, interval // PROBES) == 0:
            est_mask, mix_w = outputs
            for item in batch[1].nonzero()[:, 0]:
                stems = dict(zip(self.hparams.classes, batch[0][item]))
                self.probes.append(
                    self.measure(
                        est_mask[:, item, None], mix_w[None, item], stems
                    )
                )
        if step % interval == 0:
            self.log_steps(step, interval)

    def log_steps(self, step, interval):
        """Losses and probes of the last steps; a call of all ranks."""
        losses, probes = zip(*self.of_all_ranks((self.sums, self.probes)))
        stats = {}
        for name in sorted(set().union(*losses)):
            values = [x for rank in losses for x in rank.get(name, ())]
            stats[name] = float(torch.stack(values).mean())
        means = self.means([row for part in probes for row in part])
        if means:
            masks, static = np.mean(list(means.values()), axis=0)
            stats |= {"probe": float(masks), "probe_static": float(static)}
        seconds = (time.monotonic() - self.started) / interval
        self.started = time.monotonic()
        # loggers act on the main process, but all have to call them
        self.hparams.train_logger.log_stats(
            {"step": step, "seconds": round(seconds, 3)}, train_stats=stats
        )
        if if_main_process():
            for name, value in stats.items():
                self.tensorboard.add_scalar(f"train/{name}", value, step)
        self.sums, self.probes = {}, []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """After each epoch, measured or not, ``end_epoch``."""
        if stage == sb.Stage.TEST:
            # before the first epoch
            figures = self.figures()
            if not figures:
                raise ValueError(
                    "valid_folders: expected songs in which two classes sound "
                    f"at once, of {self.hparams.classes}; there are none"
                )
            self.hparams.history.add(0, **figures)
            self.hparams.train_logger.log_stats(
                {"epoch": 0}, valid_stats=figures
            )
        elif stage == sb.Stage.VALID or not self.groups:
            self.end_epoch(epoch)

    def end_epoch(self, epoch):
        """Logs the measures by group and class, saves, exports."""
        figures = self.figures()
        if self.slots_at_first:
            figures |= self.adapt_slots()
        so_far = {
            "step": self.optimizer_step,
            "items": self.optimizer_step * self.items_per_step,
        }
        hours = self.hours_before + (time.monotonic() - self.begun) / 3600
        self.hparams.history.add(epoch, **so_far, hours=hours, **figures)
        self.hparams.train_logger.log_stats(
            {"epoch": epoch, **so_far}, valid_stats=figures
        )
        if if_main_process():
            for name, value in figures.items():
                self.tensorboard.add_scalar(
                    f"valid/{name}", value, self.optimizer_step
                )
            self.write_curve()
            self.export()
        means = [v for k, v in figures.items() if k.endswith("_mean")]
        self.checkpointer.save_and_keep_only(
            meta={
                "score": float(np.mean(means)) if means else 0.0,
                "epoch": epoch,
            },
            max_keys=["score"],
            num_to_keep=1,
        )

    def adapt_slots(self):
        """Sets the slots of the next epoch; returns their numbers."""
        energies = sum(self.of_all_ranks(self.energies.cpu()))
        active = self.masknets[0].bin_bias[:, 0, 0].cpu() > RETIRED / 2
        shape = len(self.hparams.classes), -1
        active = adapted_slots(active.view(shape), energies.view(shape))
        use_slots(self.masknets, active)
        names = [f"slots_{name}" for name in self.hparams.classes]
        return dict(zip(names, active.sum(1).tolist()))

    def means(self, rows):
        """Class -> means of what ``measure`` found, where it counts."""
        found = {
            name: np.array([row[name] for row in rows if name in row])
            for name in self.hparams.classes
        }
        return {
            name: np.nanmean(values, axis=0)
            for name, values in found.items()
            if not np.isnan(values).all()
        }

    def figures(self):
        """Means over the windows of all ranks, by group and class."""
        rows = [row for part in self.of_all_ranks(self.rows) for row in part]
        found = {}
        for group in self.groups:
            means = self.means([row for name, row in rows if name == group])
            if not means:
                continue
            found |= {f"{group}_{k}": float(v[0]) for k, v in means.items()}
            masks, static = np.mean(list(means.values()), axis=0)
            found[f"{group}_mean"] = float(masks)
            found[f"{group}_static"] = float(static)
        return found

    def write_curve(self):
        """The history as curve.csv."""
        rows = self.hparams.history.epochs
        names = list(dict.fromkeys(name for row in rows for name in row))
        path = self.folder / "curve.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(
                {k: round(v, 3) for k, v in row.items()} for row in rows
            )

    def export(self):
        """The averaged weights as a separator folder."""
        separator = Separator.of_recipe(
            self.folder / "hyperparams.yaml",
            {"masknet": self.hparams.ema.module},
        )
        separator.bfloat16().save_pretrained(self.folder / "separator")


def initialise(experiment):
    """Loads the pre-trained separator, if a new run is to start with one.

    Raises a ValueError that names the keys in which it differs, with both
    values.
    """
    hparams = experiment.hparams
    source = hparams["pretrained_separator"]
    if not source or hparams["checkpointer"].find_checkpoint() is not None:
        return
    separator = Separator.from_pretrained(source)
    config, values = separator.config, experiment.values
    known = config | config["encoder"] | config["masknet"]
    asked = {key: values[key] for key in ("classes", "sample_rate")}
    asked |= values["Encoder"] | values["MaskNet"]
    different = [
        f"{key} is {known[key]}, this training has {value}"
        for key, value in asked.items()
        if known.get(key, value) != value
    ]
    if different:
        raise ValueError(
            f"pretrained_separator: the separator in {source} does not fit: "
            + "; ".join(different)
        )
    for net in (hparams["MaskNet"], hparams["ema"].module):
        net.load_state_dict(separator.masknet.state_dict())


def _load_teacher(hparams, device):
    """The separator that teaches, if there is one, with the same classes."""
    if not hparams.get("teacher"):
        return None
    if hparams["teacher"] == "average":
        keys = ("sample_rate", "num_spks", "classes")
        return Separator(
            hparams["Encoder"],
            hparams["ema"].module,
            hparams["Decoder"],
            **{key: hparams[key] for key in keys},
        )
    teacher = load_separator(hparams["teacher"], device)
    known = teacher.groups and list(teacher.groups), teacher.sample_rate
    asked = list(hparams["classes"]), hparams["sample_rate"]
    if known != asked:
        raise ValueError(
            f"teacher: expected classes and sample_rate {asked}, those of "
            f"{hparams['teacher']} are {known}"
        )
    return teacher


def _valid_songs(hparams):
    """Group -> songs to validate on; a folder's name is that of its group."""
    songs = {}
    for folder in hparams["valid_folders"]:
        group = pathlib.Path(folder).name
        if group in songs:
            raise ValueError(
                "valid_folders: expected other names than twice "
                f"{group}, which tell them apart"
            )
        music = Music(folder, "stems", stem_groups=hparams["stem_classes"])
        songs[group] = music.songs()
    return songs


def train(experiment):
    """Trains, validates and exports a separator of named stems."""
    hparams = experiment.hparams
    # before anything of an earlier run is written over
    initialise(experiment)
    sb.create_experiment_directory(**experiment.directory)
    brain = NamedSeparation(experiment)
    hparams["ema"].to(brain.device).eval()
    brain.slots_at_first = hparams.get("adapt_slots")
    brain.teacher = _load_teacher(hparams, brain.device)
    songs = []
    for music in (hparams["music"], hparams["mixtures"]):
        if music.folder:
            songs += music.songs(hparams["segment_seconds"])
    brain.items = hparams["items"](
        [song for song in songs if song.split in ("", "train")]
    )
    valid_songs = _valid_songs(hparams)
    parts = {"train": songs, **valid_songs}
    check_songs(hparams, {x: [s.name for s in parts[x]] for x in parts})
    brain.groups = list(valid_songs)
    valid = NamedWindows(
        valid_songs,
        hparams["sample_rate"],
        per_song=hparams["valid_windows"],
        rank=brain.rank,
        world_size=brain.num_processes,
    )
    slots = hparams["num_spks"] // len(hparams["classes"])
    brain.slot_classes = [
        name for name in hparams["classes"] for _ in range(slots)
    ]
    brain.items_per_step = hparams["batch_size"] * brain.num_processes
    brain.items_per_step *= brain.grad_accumulation_factor
    windows = None
    if brain.groups:
        windows = SaveableDataLoader(valid, batch_size=1, collate_fn=list)
        begun = hparams["checkpointer"].find_checkpoint() is not None
        if hparams["pretrained_separator"] and not begun:
            brain.evaluate(windows, progressbar=False)
    brain.fit(
        hparams["epoch_counter"],
        brain.items,
        windows,
        train_loader_kwargs={
            **hparams["train_loader_options"],
            "worker_init_fn": share_batches,
        },
        progressbar=False,
    )
