"""Separators in SpeechBrain's terms."""

from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.fetching import FetchConfig, LocalStrategy, fetch
from speechbrain.utils.parameter_transfer import Pretrainer

from trackformer_sb.inference.hub import WEIGHTS_FILE, load_weights
from trackformer_sb.inference.separator import Separator


class SafetensorsPretrainer(Pretrainer):
    """A Pretrainer whose weights are all in ``model.safetensors``.

    There the names of a module's tensors begin with its name in ``loadables``.
    SpeechBrain's own looks for a pickle per module, and only warns of keys that
    are missing.

    Arguments
    ---------
    source : str, optional
        Folder or id on the hub, if ``collect_files`` is called without.
    **pretrainer : dict
        Arguments of ``Pretrainer``.
    """

    def __init__(self, source=None, **pretrainer):
        super().__init__(**pretrainer)
        self.source = source

    def collect_files(
        self,
        default_source=None,
        local_strategy=LocalStrategy.SYMLINK,
        fetch_config=None,
    ):
        """Fetches the file, see ``Pretrainer``."""
        path = fetch(
            WEIGHTS_FILE,
            default_source or self.source,
            savedir=self.collect_in,
            local_strategy=local_strategy,
            fetch_config=fetch_config or FetchConfig(),
        )
        self.paths = dict.fromkeys(self.loadables, str(path))
        return self.paths

    def load_collected(self):
        """Loads the weights, which fit exactly or are refused."""
        for name, module in self.loadables.items():
            load_weights(module, self.paths[name], f"{name}.")


class PerformerSeparation(Pretrained):
    """A ready-to-use separator of music, of any three modules.

    ``from_hparams`` loads a separator's folder or id on the hub, and any yaml
    with these modules. A yaml can run any code: only load what you trust.

    Arguments
    ---------
    modules : dict
        ``encoder``, ``masknet`` and ``decoder``, as of ``Separator``.
    hparams : dict
        ``sample_rate`` in Hz and ``num_spks``; ``mixture_consistency`` if the
        outputs do not sum to the mixture by themselves; ``classes`` if they
        have names.
    **kwargs : dict
        ``run_opts`` and ``freeze_params`` of ``Pretrained``.
    """

    MODULES_NEEDED = ("encoder", "masknet", "decoder")
    HPARAMS_NEEDED = ("sample_rate", "num_spks")

    @property
    def separator(self):
        """The ``Separator`` of these modules."""
        hparams = self.hparams
        return Separator(
            **{name: self.mods[name] for name in self.MODULES_NEEDED},
            sample_rate=hparams.sample_rate,
            num_spks=hparams.num_spks,
            classes=getattr(hparams, "classes", None),
            mixture_consistency=getattr(hparams, "mixture_consistency", False),
        )

    def separate_batch(self, mix):
        """Mixtures [batch, time] to [batch, time, sources], nothing is scaled.

        That is the order of ``SepformerSeparation``.
        """
        return self.separator(mix).transpose(1, 2)

    def separate_file(self, path, out_folder=None, **options):
        """Separates a file of any length, see ``Separator.separate_file``."""
        return self.separator.separate_file(path, out_folder, **options)

    def forward(self, mix):
        """Separates a batch, see ``separate_batch``."""
        return self.separate_batch(mix)
