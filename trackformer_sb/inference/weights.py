"""Strict loading of weights, as the yaml of an exported separator asks for."""

from safetensors import SafetensorError
from safetensors.torch import load_file
from speechbrain.utils.fetching import FetchConfig, LocalStrategy, fetch
from speechbrain.utils.parameter_transfer import Pretrainer

from trackformer_sb.inference.folder import SAFETENSORS_FILE
from trackformer_sb.nnet.transfer import read_state


def _listed(names, limit=5):
    """The first names, for an error message."""
    rest = len(names) - limit
    words = ", ".join(names[:limit])
    return f"{words} and {rest} more" if rest > 0 else words


def load_state(module, state, source):
    """Loads a state that fits a module exactly.

    Arguments
    ---------
    module : torch.nn.Module
        Where the weights belong; unchanged on error.
    state : dict
        Name -> tensor.
    source : str or Path
        Where they come from, for messages.

    Raises
    ------
    ValueError
        If keys are missing, unexpected or of another shape.

    Example
    -------
    >>> import torch
    >>> load_state(torch.nn.ReLU(), {"weight": torch.ones(1)}, "a.safetensors")
    Traceback (most recent call last):
    ValueError: a.safetensors does not fit ReLU: unexpected weight
    """
    expected = module.state_dict()
    misshapen = [
        f"{key} (expected {list(expected[key].shape)}, got "
        f"{list(getattr(state[key], 'shape', []))})"
        for key in expected
        if key in state
        and getattr(state[key], "shape", None) != expected[key].shape
    ]
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [str(key) for key in state if key not in expected],
        "misshapen": misshapen,
    }
    if any(problems.values()):
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: "
            + "; ".join(
                f"{problem} {_listed(keys)}"
                for problem, keys in problems.items()
                if keys
            )
        )
    module.load_state_dict(state)


def read_safetensors(path):
    """Reads a file of weights that no code can hide in.

    Arguments
    ---------
    path : str or Path
        A .safetensors file.

    Returns
    -------
    dict
        Name -> tensor, on the CPU.

    Raises
    ------
    ValueError
        If it is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: no readable file of weights ({error})"
        ) from error


def load_weights(module, path):
    """Loads a file of weights that fits a module exactly.

    The exported yaml names this function as the hook of its Pretrainer, so
    that it also protects ``SepformerSeparation`` and every other interface.

    Arguments
    ---------
    module : torch.nn.Module
        Where the weights belong; unchanged on error.
    path : str or Path
        File of a state dict.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged or holds no state dict, or if keys are missing,
        unexpected or of another shape.

    Example
    -------
    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/masknet.ckpt"
    ...     torch.save({"weight": torch.ones(1, 2)}, path)
    ...     try:
    ...         load_weights(torch.nn.Linear(2, 1), path)
    ...     except ValueError as error:
    ...         print(str(error).replace(folder, "folder"))
    folder/masknet.ckpt does not fit Linear: missing bias
    """
    load_state(module, read_state(path), path)


class SafetensorsPretrainer(Pretrainer):
    """A Pretrainer whose weights are all in ``model.safetensors``.

    There the names of a module's tensors begin with its name in ``loadables``.
    SpeechBrain's own looks for a pickle per module.
    """

    def collect_files(
        self,
        default_source=None,
        local_strategy=LocalStrategy.SYMLINK,
        fetch_config=None,
    ):
        """Fetches the file, see ``Pretrainer``.

        Returns
        -------
        dict
            Name of each loadable -> the file.
        """
        path = fetch(
            SAFETENSORS_FILE,
            default_source,
            savedir=self.collect_in,
            local_strategy=local_strategy,
            fetch_config=fetch_config or FetchConfig(),
        )
        self.paths = dict.fromkeys(self.loadables, str(path))
        return self.paths

    def load_collected(self):
        """Loads the weights, which fit exactly or are refused."""
        for name, module in self.loadables.items():
            path, begin = self.paths[name], f"{name}."
            state = {
                key.removeprefix(begin): value
                for key, value in read_safetensors(path).items()
                if key.startswith(begin)
            }
            load_state(module, state, path)
