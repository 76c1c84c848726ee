"""Our parts in recipes of SpeechBrain and Asteroid, by yaml alone.

SpeechBrain's recipes are not part of its package. The Brains here have the
contract of recipes/WSJ0Mix/separation/train.py and of recipes/UrbanSound8k/
SoundClassification/train.py (names of hyperparameters, shapes, order of calls).
"""

import csv
import io
import itertools
import pathlib
import re

import pytest
import references
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain import Brain, Stage, parse_arguments
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.nnet.losses import get_si_snr_with_pitwrapper
from speechbrain.utils.run_opts import RunOptions

from trackformer_sb.inference.features import PerformerFeatures
from trackformer_sb.inference.separator import Separator
from trackformer_sb.nnet.features import SpectrogramEncoder
from trackformer_sb.nnet.mae import AudioMAE
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
from trackformer_sb.nnet.transfer import encoder_state
from trackformer_sb.objectives.mixit import get_mixit, mixit_loss
from trackformer_sb.objectives.regularized import RegularizedLoss

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
    "n_fft": 128,
    "hop_length": 32,
    "d_model": 16,
    "nhead": 2,
    "d_ffn": 24,
    "num_layers": 1,
    "n_features": 8,
    "out_n_neurons": 3,
    "lr": 0.01,
}


class Separation(Brain):
    """The separation recipe of SpeechBrain: its calls, in its order."""

    def compute_forward(self, mix, targets, stage):
        """Lists of padded signals -> [batch, time, sources], targets alike."""
        hparams, mix = self.hparams, mix.data
        targets = torch.stack(
            [targets[i].data for i in range(hparams.num_spks)], dim=-1
        )
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

    def compute_objectives(self, predictions, targets):
        """[batch]."""
        return self.hparams.loss(targets, predictions)

    def signals(self, batch):
        """The mixture and the list of targets that the recipe knows."""
        targets = [batch.s1_sig, batch.s2_sig]
        if self.hparams.num_spks == 3:
            targets.append(batch.s3_sig)
        return batch.mix_sig, targets

    def fit_batch(self, batch):
        """One step, unless there is no loss or too much of it."""
        hparams = self.hparams
        outputs = self.compute_forward(*self.signals(batch), Stage.TRAIN)
        items = self.compute_objectives(*outputs)
        assert items.shape == (len(outputs[0]),)
        if hparams.threshold_byloss:
            items = items[items > hparams.threshold]
        loss = items.mean()
        if loss < hparams.loss_upper_lim:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                self.modules.parameters(), hparams.clip_grad_norm
            )
            self.optimizer.step()
            self.train_losses.append(loss.item())
        self.optimizer.zero_grad()
        return loss.detach()

    def on_fit_start(self):
        super().on_fit_start()
        self.train_losses = []

    @torch.no_grad()
    def evaluate_batch(self, batch, stage):
        """The loss; in the test also that of the mixture as every source."""
        mix, targets = self.signals(batch)
        outputs = self.compute_forward(mix, targets, stage)
        loss = self.compute_objectives(*outputs)
        if stage == Stage.TEST:
            mixture = torch.stack([mix.data] * self.hparams.num_spks, dim=-1)
            baseline = self.compute_objectives(mixture, outputs[1])
            # a number: the recipe writes a row an item
            self.improvement = (baseline - loss).item()
        return loss.mean()

    def on_stage_end(self, stage, stage_loss, epoch):
        """Scheduler, log and checkpoint after validation."""
        if stage == Stage.VALID:
            rate, _ = self.hparams.lr_scheduler(
                [self.optimizer], epoch, stage_loss
            )
            self.hparams.train_logger.log_stats(
                {"epoch": epoch, "lr": rate}, valid_stats={"loss": stage_loss}
            )
            self.checkpointer.save_and_keep_only(
                meta={"si-snr": stage_loss}, min_keys=["si-snr"]
            )

    def reset(self, layer):
        """What the recipe does to every layer before it trains."""
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        for child in layer.children():
            self.reset(child)


def separation(hparams):
    """All that the recipe does before ``fit``."""
    if "pretrained_separator" in hparams:
        hparams["pretrained_separator"].collect_files()
        hparams["pretrained_separator"].load_collected()
    brain = Separation(
        hparams["modules"],
        hparams["optimizer"],
        hparams,
        RUN_OPTIONS,
        hparams["checkpointer"],
    )
    if "pretrained_separator" not in hparams:
        for module in brain.modules.values():
            brain.reset(module)
    return brain


def songs_table(folder):
    """Four items: two signals, next to silence, their sum; a table of them."""
    generator = torch.Generator().manual_seed(7)
    keys = ("mix_wav", "s1_wav", "s2_wav", "s3_wav")
    rows = []
    for item in range(4):
        signals = 0.1 * torch.randn(2, TIME, generator=generator)
        # one of low, one of high frequencies
        signals[0] = signals[0].cumsum(0) / 4
        signals[1] = signals[1].diff(prepend=signals[1][:1])
        silence = 1e-5 * torch.randn(TIME, generator=generator)
        for key, sig in zip(keys, (signals.sum(0), *signals, silence)):
            path = folder / f"{item}_{key}.wav"
            soundfile.write(path, sig.numpy(), 8000, subtype="FLOAT")
        paths = (f"$data_root/{item}_{key}.wav" for key in keys)
        rows.append((item, TIME / 8000, *paths))
    with open(folder / "items.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ID", "duration", *keys), *rows])
    return folder / "items.csv"


def dataset(hparams):
    """The recipe's data pipelines."""
    data = DynamicItemDataset.from_csv(
        hparams["train_data"], {"data_root": hparams["data_folder"]}
    )
    sources = [f"s{i + 1}" for i in range(hparams["num_spks"])]
    for name in ("mix", *sources):
        data.add_dynamic_item(
            read_audio, takes=f"{name}_wav", provides=f"{name}_sig"
        )
    data.set_output_keys(["id", "mix_sig", *(f"{s}_sig" for s in sources)])
    return data


def tiny_text(path, overrides):
    """A yaml with all that a test needs to override, resolved."""
    text = path.read_text("utf-8")
    tiny = {key: value for key, value in TINY.items() if f"\n{key}:" in text}
    stream = io.StringIO(text)
    return resolve_references(stream, {**tiny, **overrides}).getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return songs_table(folder).parent


@pytest.fixture
def stock_yaml(tmp_path, data, request):
    """A function: name of an example -> its text at tiny size."""

    def text(name, **overrides):
        path = EXAMPLES / f"{name}.yaml"
        keys = path.read_text("utf-8")
        folders = {
            "separator_folder": "separator",
            "encoder_folder": "encoder",
        }
        for key, fixture in folders.items():
            if f"\n{key}:" in keys:
                overrides.setdefault(key, str(request.getfixturevalue(fixture)))
        if name.startswith("wsj0mix"):
            table = str(data / "items.csv")
            overrides |= dict.fromkeys(
                ("train_data", "valid_data", "test_data"), table
            )
            overrides["dataloader_opts"] = {"num_workers": 0}
        return tiny_text(
            path,
            {
                "data_folder": str(data),
                "output_folder": str(tmp_path / name),
                **overrides,
            },
        )

    return text


SIZES = {key: TINY[key] for key in ("d_model", "nhead", "d_ffn", "num_layers")}
SIZES["n_features"] = TINY["n_features"]


def randomise(module, generator=None):
    """Weights that no initialisation draws."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.fixture(scope="module")
def separator(tmp_path_factory):
    """A folder as training leaves it, of two outputs."""
    folder = tmp_path_factory.mktemp("separator")
    yaml = folder / "hyperparams.yaml"
    overrides = {"data_folder": "data", "output_folder": "run"}
    yaml.write_text(tiny_text(EXAMPLES / "wsj0mix_stft.yaml", overrides))
    torch.manual_seed(1)
    modules = {
        "encoder": STFTEncoder(128, 32),
        "masknet": randomise(PerformerMaskNet(65, 2, **SIZES)),
        "decoder": STFTDecoder(128, 32),
    }
    return Separator.of_recipe(yaml, modules).export(folder / "separator")


PRETRAINING = """\
sample_rate: 8000
n_fft: 128
hop_length: 32
spec_norm: zscore
d_model: 16
nhead: 2
num_layers: 1
d_ffn: 24
n_features: 8
Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder
    n_fft: !ref <n_fft>
    hop_length: !ref <hop_length>
Features: !new:trackformer_sb.nnet.features.SpectrogramEncoder
    in_channels: !ref <n_fft> // 2 + 1
    d_model: !ref <d_model>
    nhead: !ref <nhead>
    num_layers: !ref <num_layers>
    d_ffn: !ref <d_ffn>
    n_features: !ref <n_features>
    spec_norm: !ref <spec_norm>
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder's folder after three steps as a masked autoencoder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(2)
    features, stft = SpectrogramEncoder(65, **SIZES), STFTEncoder(128, 32)
    mae = AudioMAE(features, d_decoder=16, decoder_nhead=2)
    optimizer = torch.optim.Adam(mae.parameters(), lr=0.01)
    for _ in range(3):
        mae(stft(torch.randn(2, TIME))).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    yaml = folder / "hyperparams.yaml"
    yaml.write_text(resolve_references(io.StringIO(PRETRAINING)).getvalue())
    exported = PerformerFeatures.of_recipe(yaml, features)
    return exported.export(folder / "encoder")


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


def best_orders(est_source, targets):
    """Negative SI-SNR by the best of all orders, [batch, N, time]."""
    losses = [
        -max(
            sum(map(references.si_snr, sources[list(order)], item)) / len(item)
            for order in itertools.permutations(range(len(item)))
        )
        for sources, item in zip(est_source, targets)
    ]
    return torch.tensor(losses).double()


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


@pytest.mark.parametrize(
    "path", [*WSJ0MIX, FEATURES], ids=lambda path: path.stem
)
def test_keys_reach_the_recipe_from_its_command_line(path):
    plain = r"^([a-z]\w+): (?!!new|!name|!apply)"
    keys = re.findall(plain, path.read_text("utf-8"), re.M)
    assert len(keys) > 20
    # none is a run option of SpeechBrain, or taken for the start of one
    assert not set(keys) & set(RunOptions().as_dict())
    argv = [str(path), *(f"--{key}=17" for key in keys)]
    name, _, overrides = parse_arguments(argv)
    assert name == str(path)
    assert load_hyperpyyaml(overrides) == dict.fromkeys(keys, 17)


@pytest.mark.parametrize(
    "path", [*WSJ0MIX, FEATURES], ids=lambda path: path.stem
)
def test_files_name_their_recipe_and_command(path):
    head = re.match(r"(?:#.*\n)+", path.read_text("utf-8"))[0]
    assert f"python train.py EXAMPLES/{path.name}" in head
    recipe = {"wsj0mix": "WSJ0Mix/separation"}
    recipe = recipe.get(path.stem.split("_")[0], "UrbanSound8k/SoundClass")
    assert f"in recipes/{recipe}" in head
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    assert f"| `{path.name}` | {recipe}" in readme


def test_all_files_are_listed():
    suffixes = {path.suffix for path in EXAMPLES.iterdir()}
    assert suffixes == {".yaml", ".md", ".ogg"}
    assert sorted(EXAMPLES.glob("*.yaml")) == sorted([*WSJ0MIX, FEATURES])
    assert len(WSJ0MIX) == 5


# --- SpeechBrain's separation recipe -----------------------------------------


@pytest.mark.parametrize("path", WSJ0MIX, ids=lambda path: path.stem)
def test_separation_trains_two_steps(path, stock_yaml):
    hparams = load_hyperpyyaml(stock_yaml(path.stem))
    brain = separation(hparams)
    modules = hparams["modules"]
    before = {name: copied(module) for name, module in modules.items()}
    items = dataset(hparams)
    options = hparams["dataloader_opts"]
    items = items.filtered_sorted(select_n=2)
    brain.fit(hparams["epoch_counter"], items, items, options, options)
    assert len(brain.train_losses) == 2
    for name, module in modules.items():
        # all of it learns, and nothing else of it changes
        assert changed(before[name], module) == parameters_of(module), name
        assert all(v.isfinite().all() for v in module.state_dict().values())
    loss = brain.evaluate(items, min_key="si-snr", test_loader_kwargs=options)
    assert abs(loss) < 200 and abs(brain.improvement) < 200
    # what was saved is what was trained
    trained = copied(modules["masknet"])
    randomise(modules["masknet"])
    hparams["checkpointer"].recover_if_possible()
    assert not changed(trained, modules["masknet"])


@pytest.mark.parametrize("name", ("wsj0mix_conv", "wsj0mix_stft"))
def test_loss_falls(name, stock_yaml):
    hparams = load_hyperpyyaml(stock_yaml(name, number_of_epochs=8))
    brain, items = separation(hparams), dataset(hparams)
    options = hparams["dataloader_opts"]
    brain.fit(hparams["epoch_counter"], items, items, options, options)
    log = pathlib.Path(hparams["train_log"]).read_text("utf-8")
    losses = [float(x) for x in re.findall(r"valid loss: (\S+)", log)]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 3


def batch_of(hparams, stage=Stage.VALID):
    """The outputs and targets of a brain of a yaml for one batch."""
    brain, items = separation(hparams), dataset(hparams)
    for module in brain.modules.values():
        module.train(stage == Stage.TRAIN)
    batch = PaddedBatch([items[i] for i in range(3)])
    mix, targets = brain.signals(batch)
    return brain, mix.data, *brain.compute_forward(mix, targets, stage)


@pytest.mark.parametrize("name", ("wsj0mix_conv", "wsj0mix_stft"))
def test_pit_of_the_recipe_finds_the_best_order(name, stock_yaml):
    hparams = load_hyperpyyaml(stock_yaml(name))
    brain, mix, outputs, targets = batch_of(hparams)
    assert outputs.shape == targets.shape == (3, TIME, 2)
    torch.testing.assert_close(targets.sum(-1), mix)
    expected = best_orders(outputs.detach().mT, targets.mT)
    torch.testing.assert_close(
        brain.compute_objectives(outputs, targets).double(),
        expected,
        atol=1e-3,
        rtol=1e-4,
    )


def test_learned_encoder_and_decoder_have_one_stride(stock_yaml):
    hparams = load_hyperpyyaml(stock_yaml("wsj0mix_conv"))
    encoder, decoder = hparams["Encoder"], hparams["Decoder"]
    for time in (TIME, 2 * TIME):
        decoded = decoder(encoder(torch.randn(2, time)))
        assert 0 <= time - decoded.shape[1] < encoder.conv1d.stride[0]


def test_lines_that_differ_go_into_the_recipe(stock_yaml):
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    lines = readme.split("```yaml\n")[1].split("```")[0]
    text = f"N_encoder_out: 12\nnum_spks: 3\n{lines}"
    masknet = load_hyperpyyaml(text)["MaskNet"]
    masks = masknet(torch.rand(2, 12, 20))
    assert masks.shape == (3, 2, 12, 20)
    assert masks.min() == 0


def test_stft_outputs_sum_to_the_mixture(stock_yaml):
    hparams = load_hyperpyyaml(stock_yaml("wsj0mix_stft"))
    _, mix, outputs, _ = batch_of(hparams)
    torch.testing.assert_close(outputs.sum(-1), mix, atol=1e-5, rtol=1e-4)


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
    padded = PaddedBatch([{"sig": sig} for sig in mix]).sig
    expected, _ = brain.compute_forward(padded, [padded] * 2, Stage.TEST)
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
    brain, mix, outputs, targets = batch_of(hparams, Stage.TRAIN)
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
    value = brain.compute_objectives(outputs, targets)
    torch.testing.assert_close(
        value.detach().double(), expected, atol=1e-3, rtol=1e-4
    )
    # in evaluation it is MixIT alone, with or without a forward before
    brain.modules.eval()
    for _ in range(2):
        value = brain.compute_objectives(outputs, targets)
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
        brain, _, outputs, targets = batch_of(hparams, Stage.TRAIN)
        brain.compute_objectives(outputs, targets).mean().backward()
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


def test_mixit_alone_needs_no_adaptor(stock_yaml):
    text = stock_yaml("wsj0mix_stft").replace(
        "!name:speechbrain.nnet.losses.get_si_snr_with_pitwrapper",
        "!name:trackformer_sb.objectives.mixit.get_mixit",
    )
    hparams = load_hyperpyyaml(text)
    brain, _, outputs, targets = batch_of(hparams)
    expected, _ = mixit_loss(outputs.transpose(1, 2), targets.transpose(1, 2))
    value = brain.compute_objectives(outputs, targets)
    torch.testing.assert_close(value, expected)
    value.mean().backward()
    assert hparams["MaskNet"].head.weight.grad.any()


@pytest.mark.parametrize("level", (0.0, 1e-5))
def test_a_third_target_next_to_silence_is_given_no_output(level):
    targets, predictions = torch.randn(8, 500, 2), torch.randn(8, 500, 3)
    # also if an output is soft, or near to the third target
    predictions[2:4, :, 2] *= 0.03
    third = level * torch.randn(8, 500, 1)
    predictions[4:6, :, 2:] = 100 * third[4:6]
    three = torch.cat((targets, third), dim=2)
    _, assignment = mixit_loss(predictions.mT, three.mT)
    if level == 0:
        # silence for silence may be its own
        assignment[4:6, 2, 2] = 0
    assert not assignment[:, 2].any()
    # the mean over three mixtures, one of them at the threshold of 30 dB
    torch.testing.assert_close(
        get_mixit(three, predictions),
        (2 * get_mixit(targets, predictions) - 30) / 3,
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("base", (get_mixit, get_si_snr_with_pitwrapper))
def test_regularized_loss_takes_any_loss_of_the_recipe(base):
    masknet = PerformerMaskNet(65, 3, **SIZES)
    loss = RegularizedLoss(base, masknet, 0.5, 0.25)
    masks = masknet(torch.randn(2, 65, 20, dtype=torch.complex64))
    targets, predictions = torch.randn(2, 400, 3), torch.randn(2, 400, 3)
    value = loss(targets, predictions.clone()).detach().double()
    expected = base(targets, predictions.clone()).double()
    diversity = references.diversity(masks.detach().transpose(0, 1))
    sparsity = references.sparsity(predictions.mT, targets.sum(-1))
    assert (0.5 * diversity).min() > 0.1 and (0.25 * sparsity).min() > 0.1
    expected = expected + 0.5 * diversity + 0.25 * sparsity
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)


def test_what_has_no_weight_is_not_asked_for():
    """Diversity is of two masks or more."""
    masknet = PerformerMaskNet(65, 1, **SIZES)
    loss = RegularizedLoss(get_mixit, masknet, 0.0, 0.0)
    masknet(torch.randn(2, 65, 20, dtype=torch.complex64))
    targets, predictions = torch.randn(2, 400, 2), torch.randn(2, 400, 1)
    expected = get_mixit(targets, predictions)
    assert torch.equal(loss(targets, predictions), expected)


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


def test_another_masknet_in_the_loss_is_refused(stock_yaml):
    hparams = load_hyperpyyaml(stock_yaml("wsj0mix_mixit"))
    hparams["loss"] = RegularizedLoss(
        get_mixit, PerformerMaskNet(65, 3, **SIZES)
    )
    brain, _, outputs, targets = batch_of(hparams, Stage.TRAIN)
    with pytest.raises(RuntimeError, match="the one that the recipe calls"):
        brain.compute_objectives(outputs, targets)


# --- pre-trained parts -------------------------------------------------------


def test_separator_is_wiped_without_the_key_and_kept_with_it(
    stock_yaml, separator
):
    text = stock_yaml("wsj0mix_fine_tuning")
    hparams = load_hyperpyyaml(text)
    separation(hparams)
    masknet = hparams["MaskNet"]
    state = Separator.from_pretrained(separator).masknet.state_dict()
    assert not changed(state, masknet)
    # as a recipe that loads it under a name of its own
    hparams = load_hyperpyyaml(
        text.replace("pretrained_separator:", "pretrained_masknet:")
    )
    hparams["pretrained_masknet"].collect_files()
    hparams["pretrained_masknet"].load_collected()
    masknet = hparams["MaskNet"]
    assert not changed(state, masknet)
    separation(hparams)
    wiped = changed(state, masknet)
    # only what has no reset_parameters is left of it
    assert parameters_of(masknet) - wiped == {
        name for name in parameters_of(masknet) if "temperature" in name
    }
    assert {"head.weight", "embedding.weight"} <= wiped


def test_training_goes_on_where_the_separator_was(stock_yaml, separator):
    hparams = load_hyperpyyaml(stock_yaml("wsj0mix_fine_tuning"))
    _, mix, outputs, _ = batch_of(hparams)
    hub = SepformerSeparation.from_hparams(str(separator), run_opts=CPU)
    torch.testing.assert_close(outputs.detach(), hub.separate_batch(mix))


def test_separator_of_other_sizes_is_refused(stock_yaml):
    hparams = load_hyperpyyaml(stock_yaml("wsj0mix_fine_tuning", num_spks=3))
    message = r"(?s)model.safetensors: .*size mismatch for head"
    with pytest.raises(ValueError, match=message):
        separation(hparams)


def test_encoder_is_wiped_without_the_key_and_kept_with_it(stock_yaml, encoder):
    text = stock_yaml("wsj0mix_encoder")
    hparams = load_hyperpyyaml(text)
    state = PerformerFeatures.from_pretrained(encoder).encoder.state_dict()
    fresh = copied(hparams["MaskNet"].head)
    separation(hparams)
    kept = encoder_state(hparams["MaskNet"])
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[key], state[key]) for key in state)
    assert not changed(fresh, hparams["MaskNet"].head)
    hparams = load_hyperpyyaml(
        text.replace("pretrained_separator:", "pretrained_encoder:")
    )
    separation(hparams)
    wiped = encoder_state(hparams["MaskNet"])
    assert not torch.equal(wiped["embedding.weight"], state["embedding.weight"])


# --- features in SpeechBrain's classification recipe -------------------------


class Classification(Brain):
    """The sound classification recipe of SpeechBrain: its calls."""

    def compute_forward(self, batch, stage):
        """[batch, 1, classes], logarithms of probabilities."""
        batch = batch.to(self.device)
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

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Rate, log and checkpoint after validation."""
        if stage == Stage.VALID:
            rate, _ = self.hparams.lr_annealing(epoch)
            self.hparams.train_logger.log_stats(
                {"epoch": epoch, "lr": rate}, valid_stats={"loss": stage_loss}
            )
            meta = {"error": stage_loss}
            self.checkpointer.save_and_keep_only(meta, min_keys=["error"])


def classification(hparams):
    """A brain, and four sounds of three classes."""
    brain = Classification(
        hparams["modules"],
        hparams["opt_class"],
        hparams,
        RUN_OPTIONS,
        hparams["checkpointer"],
    )
    generator = torch.Generator().manual_seed(3)
    sounds = {
        str(i): {
            "sig": torch.randn(TIME, generator=generator),
            "class_string_encoded": torch.tensor([i % 3]),
        }
        for i in range(4)
    }
    keys = ["id", "sig", "class_string_encoded"]
    return brain, DynamicItemDataset(sounds, output_keys=keys)


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
    if freeze_params:
        assert not changed(before[0], features)
        # without dropout even while the classifier trains
        brain.modules.train()
        wavs = torch.randn(2, TIME)
        assert torch.equal(features(wavs), alone(wavs))
    else:
        assert changed(before[0], features) == parameters_of(features)
        brain.modules.train()
        wavs = torch.randn(2, TIME)
        assert not torch.equal(features(wavs), features(wavs))
    # both come back from the checkpoint
    trained = copied(features), copied(classifier)
    randomise(classifier)
    if not freeze_params:
        randomise(features)
    hparams["checkpointer"].recover_if_possible()
    assert not changed(trained[0], features)
    assert not changed(trained[1], classifier)


# --- Asteroid ----------------------------------------------------------------


def asteroid_loader():
    """Four sums of two mixtures, and the mixtures."""
    mixtures = torch.randn(4, 2, TIME)
    data = torch.utils.data.TensorDataset(mixtures.sum(1), mixtures)
    return torch.utils.data.DataLoader(data, batch_size=2)


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
    loader = asteroid_loader()
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


@pytest.mark.filterwarnings("ignore")
def test_asteroid_system_with_pit(tmp_path):
    losses = pytest.importorskip("asteroid.losses")
    loader = asteroid_loader()
    system = readme_system(loader)
    masknet = PerformerMaskNet(256, 2, mask_activation="relu", **SIZES)
    system.model.masker.masknet = masknet
    system.optimizer = torch.optim.Adam(system.model.parameters())
    system.loss_func = losses.PITLossWrapper(losses.pairwise_neg_sisdr)
    system.eval()
    mix, mixtures = next(iter(loader))
    estimate = system(mix).detach()
    expected = best_orders(estimate, mixtures)
    torch.testing.assert_close(
        system.common_step((mix, mixtures), 0).double(),
        expected.mean(),
        atol=1e-3,
        rtol=1e-4,
    )
    changed_names = train_system(system.train(), tmp_path)
    assert changed_names == parameters_of(system.model)
