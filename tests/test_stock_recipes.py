"""Our parts in recipes of SpeechBrain and Asteroid, by yaml alone.

SpeechBrain's recipes are not part of its package. The Brains here have the
contract of recipes/WSJ0Mix/separation/train.py and of recipes/UrbanSound8k/
SoundClassification/train.py (names of hyperparameters, shapes, order of calls).
"""

import io
import pathlib
import re

import pytest
import references
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from separators import performer
from speechbrain import Brain, Stage
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.inference.separation import SepformerSeparation

from trackformer_sb.inference.features import PerformerFeatures, encoder_of
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.objectives.mixit import get_mixit, mixit_loss
from trackformer_sb.objectives.regularizers import RegularizedLoss

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
WSJ0MIX = sorted(EXAMPLES.glob("wsj0mix_*.yaml"))
FEATURES = EXAMPLES / "urbansound8k_features.yaml"
TIME = 2003
CPU = {"device": "cpu"}
RUN_OPTIONS = {**CPU, "noprogressbar": True}

# What the scripts of the recipes read of their yaml.
COMMON_KEYS = """
    data_folder output_folder save_folder sample_rate modules checkpointer
    epoch_counter train_logger
""".split()
RECIPE_KEYS = {
    "wsj0mix": """
        num_spks skip_prep train_data valid_data test_data dynamic_mixing
        Encoder MaskNet Decoder optimizer loss lr_scheduler dataloader_opts
        use_speedperturb use_wavedrop limit_training_signal_len
        training_signal_len threshold_byloss threshold loss_upper_lim
        clip_grad_norm save_audio
    """.split(),
    "urbansound8k": """
        audio_data_folder train_annotation valid_annotation test_annotation
        train_fold_nums valid_fold_nums test_fold_nums skip_manifest_creation
        prepare_noise_data prepare_rir_data use_tensorboard out_n_neurons
        amp_to_db normalize compute_cost opt_class lr_annealing error_stats
        dataloader_options
    """.split(),
}

# Sizes for a test, of those keys that a yaml has.
TINY = {
    "sample_rate": 8000,
    "number_of_epochs": 1,
    "training_signal_len": 1600,
    "N_encoder_out": 16,
    "n_fft": 256,
    "hop_length": 64,
    "d_model": 16,
    "nhead": 2,
    "d_ffn": 24,
    "num_layers": 1,
    "n_features": 8,
    "out_n_neurons": 3,
    "lr": 0.01,
}


class Recipe(Brain):
    """What both recipes do after a validation."""

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Rate, log and checkpoint."""
        if stage != Stage.VALID:
            return
        if hasattr(self.hparams, "lr_scheduler"):
            rate, _ = self.hparams.lr_scheduler(
                [self.optimizer], epoch, stage_loss
            )
        else:
            rate, _ = self.hparams.lr_annealing(epoch)
        self.hparams.train_logger.log_stats(
            {"epoch": epoch, "lr": rate}, valid_stats={"loss": stage_loss}
        )
        self.checkpointer.save_and_keep_only({"loss": stage_loss})


class Separation(Recipe):
    """The separation recipe of SpeechBrain: its calls, in its order."""

    def compute_forward(self, batch, stage):
        """[batch, time, sources], and targets alike."""
        hparams, mix = self.hparams, batch.mix_sig.data
        names = [f"s{i + 1}_sig" for i in range(hparams.num_spks)]
        targets = torch.stack([getattr(batch, x).data for x in names], dim=-1)
        if stage == Stage.TRAIN and hparams.limit_training_signal_len:
            length = hparams.training_signal_len
            mix, targets = mix[:, :length], targets[:, :length]
        mix_w = hparams.Encoder(mix)
        est_mask = hparams.MaskNet(mix_w)
        sep_h = torch.stack([mix_w] * hparams.num_spks) * est_mask
        est_source = [hparams.Decoder(sep_h[i]) for i in range(len(sep_h))]
        est_source = torch.stack(est_source, dim=-1)
        missing = max(0, mix.shape[1] - est_source.shape[1])
        est_source = torch.nn.functional.pad(est_source, (0, 0, 0, missing))
        return est_source[:, : mix.shape[1]], targets

    def compute_objectives(self, predictions, batch, stage):
        """The mean over those items that are not separated well enough."""
        est_source, targets = predictions
        items = self.hparams.loss(targets, est_source)
        assert items.shape == (len(targets),)
        if stage == Stage.TRAIN and self.hparams.threshold_byloss:
            items = items[items > self.hparams.threshold]
        return items.mean()


def reset(layer):
    """What the separation recipe does to every layer before it trains."""
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()
    for child in layer.children():
        reset(child)


def separation(hparams):
    """All that the recipe does before ``fit``."""
    brain = Separation(
        hparams["modules"],
        hparams["optimizer"],
        hparams,
        RUN_OPTIONS,
        hparams["checkpointer"],
    )
    if "pretrained_separator" in hparams:
        hparams["pretrained_separator"].collect_files()
        hparams["pretrained_separator"].load_collected()
    else:
        reset(brain.modules)
    return brain


def songs(num_spks):
    """Four items: two signals, next to silence, and their sum."""
    generator = torch.Generator().manual_seed(7)
    items = {}
    for item in range(4):
        sources = 0.1 * torch.randn(3, TIME, generator=generator)
        # one of low, one of high frequencies
        sources[0] = sources[0].cumsum(0) / 4
        sources[1] = sources[1].diff(prepend=sources[1][:1])
        sources[2] *= 1e-4
        signals = {f"s{i + 1}_sig": sources[i] for i in range(num_spks)}
        items[str(item)] = {"mix_sig": sources[:2].sum(0), **signals}
    return DynamicItemDataset(items, output_keys=["id", *items["0"]])


@pytest.fixture
def stock_yaml(tmp_path, request):
    """A function: name of an example -> its text at tiny size, resolved."""

    def text(name, **overrides):
        text = (EXAMPLES / f"{name}.yaml").read_text("utf-8")
        values = {
            **TINY,
            "data_folder": str(tmp_path),
            "output_folder": str(tmp_path / name),
            "dataloader_opts": {"num_workers": 0},
            "separator_folder": "separator",
            "encoder_folder": "encoder",
        }
        values = {key: x for key, x in values.items() if f"\n{key}:" in text}
        for key in {"separator_folder", "encoder_folder"} & values.keys():
            values[key] = str(request.getfixturevalue(values[key]))
        stream = io.StringIO(text)
        return resolve_references(stream, {**values, **overrides}).getvalue()

    return text


SIZES = {key: TINY[key] for key in ("d_model", "nhead", "d_ffn", "num_layers")}
SIZES["n_features"] = TINY["n_features"]


def randomise(module):
    """Weights that no initialisation draws."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.fixture(scope="module")
def separator(tmp_path_factory):
    """A folder as training leaves it, of two outputs."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("separator")
    return performer(2, **SIZES).export(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder as pre-training leaves it."""
    torch.manual_seed(2)
    features = randomise(PerformerFeatures(8000, 256, 64, **SIZES))
    return features.export(tmp_path_factory.mktemp("encoder"))


def copied(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def changed(before, module):
    """The keys of a module whose values are not those before."""
    state = module.state_dict()
    return {key for key in state if not torch.equal(state[key], before[key])}


def parameters_of(module):
    return {name for name, _ in module.named_parameters()}


def readme_code(word):
    """The code of the README that has a word in it."""
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    blocks = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    (code,) = (block for block in blocks if word in block)
    return code


# --- the files ---------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [*WSJ0MIX, FEATURES], ids=lambda path: path.stem
)
def test_keys_are_those_that_the_recipe_reads(path):
    text = path.read_text("utf-8")
    keys = re.findall(r"^(\w+):", text, re.M)
    assert len(keys) == len(set(keys))
    needed = {*COMMON_KEYS, *RECIPE_KEYS[path.stem.split("_")[0]]}
    assert needed <= set(keys)
    own = {
        key
        for key in set(keys) - needed
        if f"<{key}>" not in text and not key.startswith("__")
    }
    assert own <= {"pretrained_separator"}


# --- SpeechBrain's separation recipe -----------------------------------------


@pytest.mark.parametrize("path", WSJ0MIX, ids=lambda path: path.stem)
def test_separation_trains_two_steps(path, stock_yaml):
    hparams = load_hyperpyyaml(stock_yaml(path.stem))
    brain = separation(hparams)
    modules = hparams["modules"]
    before = {name: copied(module) for name, module in modules.items()}
    items = songs(hparams["num_spks"]).filtered_sorted(select_n=2)
    options = hparams["dataloader_opts"]
    brain.fit(hparams["epoch_counter"], items, items, options, options)
    assert brain.optimizer_step == 2
    for name, module in modules.items():
        # all of it learns, and nothing else of it changes
        assert changed(before[name], module) == parameters_of(module), name
        assert all(v.isfinite().all() for v in module.state_dict().values())
    # what was saved is what was trained
    trained = copied(modules["masknet"])
    randomise(modules["masknet"])
    loss = brain.evaluate(items, test_loader_kwargs=options)
    assert abs(loss) < 200
    assert not changed(trained, modules["masknet"])


def batch_of(hparams, stage=Stage.VALID):
    """The mixtures, outputs and targets of a batch of a yaml."""
    brain, items = separation(hparams), songs(hparams["num_spks"])
    brain.modules.train(stage == Stage.TRAIN)
    batch = PaddedBatch([items[i] for i in range(3)])
    return batch.mix_sig.data, *brain.compute_forward(batch, stage)


def test_lines_that_differ_go_into_the_recipe(stock_yaml):
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    lines = readme.split("```yaml\n")[1].split("```")[0]
    text = f"N_encoder_out: 12\nnum_spks: 3\n{lines}"
    masknet = load_hyperpyyaml(text)["MaskNet"]
    masks = masknet(torch.rand(2, 12, 20))
    assert masks.shape == (3, 2, 12, 20)
    assert masks.min() == 0


@pytest.mark.parametrize("name", ("wsj0mix_conv", "wsj0mix_stft"))
def test_hub_class_gives_the_samples_of_the_recipe(name, stock_yaml, tmp_path):
    text = stock_yaml(name)
    hparams = load_hyperpyyaml(text)
    randomise(hparams["MaskNet"])
    folder = pathlib.Path(hparams["output_folder"])
    folder.mkdir(exist_ok=True)
    (folder / "hyperparams.yaml").write_text(text)
    exec(readme_code("of_recipe"), {"hparams": hparams})
    folder = folder / "separator"
    hub = SepformerSeparation.from_hparams(str(folder), run_opts=CPU)
    mix = torch.randn(2, TIME)
    # the recipe's own path, without its reset of weights
    brain = Separation(hparams["modules"], None, hparams, RUN_OPTIONS)
    brain.modules.eval()
    keys = ("mix_sig", "s1_sig", "s2_sig")
    batch = PaddedBatch([dict.fromkeys(keys, sig) for sig in mix])
    expected, _ = brain.compute_forward(batch, Stage.TEST)
    est_source = hub.separate_batch(mix)
    assert est_source.shape == (2, TIME, 2)
    torch.testing.assert_close(est_source, expected.detach())


# --- MixIT and its companions ------------------------------------------------


def test_mixit_yaml_adds_the_three_losses(stock_yaml):
    hparams = load_hyperpyyaml(
        stock_yaml("wsj0mix_mixit", lambda_diversity=0.3, lambda_sparsity=0.7)
    )
    masks = []
    hparams["MaskNet"].register_forward_hook(
        lambda masknet, inputs, output: masks.append(output.detach())
    )
    mix, outputs, targets = batch_of(hparams, Stage.TRAIN)
    length = hparams["training_signal_len"]
    assert outputs.shape == (3, length, 3)
    est_source = outputs.detach().transpose(1, 2)
    mixtures = targets.transpose(1, 2)
    parts = (
        references.mixit(est_source, mixtures, "snr")[0],
        references.diversity(masks[0].transpose(0, 1)),
        references.sparsity(est_source, mix[:, :length]),
    )
    expected = parts[0] + 0.3 * parts[1] + 0.7 * parts[2]
    value = hparams["loss"](targets, outputs)
    torch.testing.assert_close(
        value.detach().double(), expected, atol=1e-3, rtol=1e-4
    )
    # in evaluation it is MixIT alone, with or without a forward before
    hparams["MaskNet"].eval()
    for _ in range(2):
        value = hparams["loss"](targets, outputs)
        torch.testing.assert_close(
            value.detach().double(), parts[0], atol=1e-3, rtol=1e-4
        )


def test_diversity_and_sparsity_reach_the_weights(stock_yaml):
    gradients = []
    for weights in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        names = ("lambda_diversity", "lambda_sparsity")
        hparams = load_hyperpyyaml(
            stock_yaml("wsj0mix_mixit", **dict(zip(names, weights)))
        )
        torch.manual_seed(0)
        _, outputs, targets = batch_of(hparams, Stage.TRAIN)
        hparams["loss"](targets, outputs).mean().backward()
        gradients.append(hparams["MaskNet"].head.weight.grad.clone())
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() > 1e-3


def test_the_mask_count_is_added_where_it_has_a_weight():
    masknet = torch.nn.Identity()
    mix, sources = torch.randn(1, 50, 1), torch.randn(1, 50, 2)
    loss = RegularizedLoss(
        *(lambda targets, predictions: torch.zeros(1), masknet),
        *(0.0, 0.0, 0.5),
    )
    # two masks of which both let all pass
    masknet(torch.ones(2, 1, 65, 50))
    assert loss(mix, sources).item() == pytest.approx(1.0)


def test_a_third_target_next_to_silence_is_given_no_output():
    targets, predictions = torch.randn(8, 500, 2), torch.randn(8, 500, 3)
    # also if an output is soft, or near to the third target
    predictions[2:4, :, 2] *= 0.03
    third = 1e-5 * torch.randn(8, 500, 1)
    predictions[4:6, :, 2:] = 100 * third[4:6]
    three = torch.cat((targets, third), dim=2)
    _, assignment = mixit_loss(predictions.mT, three.mT)
    assert not assignment[:, 2].any()
    # the mean over three mixtures, one of them at the threshold of 30 dB
    torch.testing.assert_close(
        get_mixit(three, predictions),
        (2 * get_mixit(targets, predictions) - 30) / 3,
        atol=1e-4,
        rtol=1e-4,
    )


def test_masks_end_with_their_step():
    masknet = PerformerMaskNet(65, 3, **SIZES)
    loss = RegularizedLoss(get_mixit, masknet)
    mix_w = torch.randn(2, 65, 20, dtype=torch.complex64)
    signals = torch.randn(2, 400, 2), torch.randn(2, 400, 3)
    masknet(mix_w)
    loss(*signals)
    # neither those of the last step, nor those of a validation
    for training in (True, False):
        masknet.train(training)
        if not training:
            masknet(mix_w)
            masknet.train()
        message = "masknet: expected the one that the recipe calls, got one"
        with pytest.raises(RuntimeError, match=message):
            loss(*signals)


# --- pre-trained parts -------------------------------------------------------


def test_training_goes_on_where_the_separator_was(stock_yaml, separator):
    hparams = load_hyperpyyaml(stock_yaml("wsj0mix_fine_tuning"))
    mix, outputs, _ = batch_of(hparams)
    hub = SepformerSeparation.from_hparams(str(separator), run_opts=CPU)
    torch.testing.assert_close(outputs.detach(), hub.separate_batch(mix))


def test_recipe_keeps_the_encoder_and_not_its_own_draws(stock_yaml, encoder):
    hparams = load_hyperpyyaml(stock_yaml("wsj0mix_encoder"))
    separation(hparams)
    features = PerformerFeatures.from_pretrained(encoder).encoder
    assert not changed(features.state_dict(), encoder_of(hparams["MaskNet"]))


# --- features in SpeechBrain's classification recipe -------------------------


class Classification(Recipe):
    """The sound classification recipe of SpeechBrain: its calls."""

    def compute_forward(self, batch, stage):
        """[batch, 1, classes], logarithms of probabilities."""
        wavs, lens = batch.sig
        feats = self.modules.compute_features(wavs)
        if self.hparams.normalize:
            feats = self.modules.mean_var_norm(feats, lens)
        embeddings = self.modules.embedding_model(feats)
        return self.modules.classifier(embeddings), lens

    def compute_objectives(self, predictions, batch, stage):
        """The mean over the batch."""
        predictions, lens = predictions
        classes = batch.class_string_encoded.data
        return self.hparams.compute_cost(predictions, classes, lens)


def classification(hparams):
    """A brain, and four sounds of three classes."""
    brain = Classification(
        hparams["modules"],
        hparams["opt_class"],
        hparams,
        RUN_OPTIONS,
        hparams["checkpointer"],
    )
    sounds = {
        str(i): {
            "sig": torch.randn(TIME),
            "class_string_encoded": torch.tensor([i % 3]),
        }
        for i in range(4)
    }
    return brain, DynamicItemDataset(sounds, output_keys=["id", *sounds["0"]])


@pytest.mark.parametrize("freeze_params", (True, False))
def test_features_in_a_classifier(freeze_params, stock_yaml, encoder):
    hparams = load_hyperpyyaml(
        stock_yaml(
            "urbansound8k_features",
            freeze_params=freeze_params,
            dataloader_options={"num_workers": 0, "batch_size": 2},
        )
    )
    brain, sounds = classification(hparams)
    features, classifier = hparams["compute_features"], hparams["classifier"]
    before = copied(features), copied(classifier)
    alone = PerformerFeatures.from_pretrained(encoder)
    assert not changed(copied(alone), features)
    options = hparams["dataloader_options"]
    brain.fit(hparams["epoch_counter"], sounds, sounds, options, options)
    assert brain.optimizer_step == 2
    assert changed(before[1], classifier) == parameters_of(classifier)
    moved = changed(before[0], features)
    brain.modules.train()
    wavs = torch.randn(2, TIME)
    if freeze_params:
        # without dropout even while the classifier trains
        assert not moved and torch.equal(features(wavs), alone(wavs))
    else:
        assert moved == parameters_of(features)
        assert not torch.equal(features(wavs), features(wavs))


# --- Asteroid ----------------------------------------------------------------


def train_system(system, folder):
    """Two steps of Asteroid's trainer; which parameters changed."""
    lightning = pytest.importorskip("pytorch_lightning")
    before = copied(system.model)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=lightning.loggers.CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(system)
    assert trainer.global_step == 2
    for key in ("loss", "val_loss"):
        assert trainer.callback_metrics[key].isfinite()
    return changed(before, system.model)


def readme_system(loader):
    """What the code of the README makes."""
    names = {"train_loader": loader, "val_loader": loader}
    exec(readme_code("asteroid"), names)
    return names["system"]


@pytest.mark.filterwarnings("ignore")
def test_asteroid_system_with_mixit(tmp_path):
    losses = pytest.importorskip("asteroid.losses")
    mixtures = torch.randn(4, 2, TIME)
    data = torch.utils.data.TensorDataset(mixtures.sum(1), mixtures)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    system = readme_system(loader)
    parameters = parameters_of(system.model)
    assert {"encoder.filterbank._filters", "masker.masknet.head.weight"} <= (
        parameters
    )
    # the same loss as by Asteroid's own search, on the model's outputs
    system.eval()
    batch = next(iter(loader))
    value = system.common_step(batch, 0)

    def snr(est_targets, targets):
        error = (targets - est_targets).square().sum(-1)
        energy = targets.square().sum(-1)
        return 10 * ((error + 1e-3 * energy) / energy).log10().mean(-1)

    system.loss_func = losses.MixITLossWrapper(snr)
    torch.testing.assert_close(system.common_step(batch, 0), value)
    system = readme_system(loader)
    assert train_system(system, tmp_path) == parameters
