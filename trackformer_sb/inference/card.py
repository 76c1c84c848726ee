"""The model card (README.md) of a separator's folder."""

FRONT = """\
---
library_name: speechbrain
pipeline_tag: audio-to-audio
license: apache-2.0
tags:
- speechbrain
- trackformer_sb
- audio-source-separation
- music-source-separation
- unsupervised
- mixit
---

# {title}
"""

UNNAMED = """
Separates music into {num_spks} waveforms that sum to it. Trained with mixture
invariant training (MixIT, arXiv 2006.12701), which needs no separated stems.

## How to use

```python
from trackformer_sb.inference.interfaces import PerformerSeparation

separator = PerformerSeparation.from_hparams(source="path/to/this/folder")
paths = separator.separate_file("song.wav", out_folder="sources")
```

```shell
trackformer separate song.wav --model path/to/this/folder --out sources
```

`hyperparams.yaml` is code: loading it, here and in SpeechBrain, runs what it
says. SpeechBrain's `SepformerSeparation.from_hparams` loads the folder as
well; its `separate_file` scales each source to a peak of one.
"""

PLAIN = """
Without running any code of this folder, from `config.json` and
`model.safetensors`:

```python
from trackformer_sb.inference.pretrained import PerformerSeparator

separator = PerformerSeparator.from_pretrained("path/to/this/folder")
est_source = separator(mix)  # [batch, time] -> [batch, time, sources]
```

In Asteroid, whose own loader takes `pytorch_model.bin` (tensors and plain
values), or the id of this model on the hub:

```python
from asteroid.models import BaseModel
from trackformer_sb.asteroid import PerformerSeparatorModel  # registers it

path = "path/to/this/folder/pytorch_model.bin"
model = BaseModel.from_pretrained(path).eval()
est_source = model(mix)  # [batch, time] -> [batch, sources, time]
```

`PerformerSeparatorModel.from_pretrained("path/to/this/folder")` is the same
model from the safetensors.
"""

NAMED = """
Separates music into {stems}, which sum to it.

## How to use

```shell
trackformer separate song.mp3 --model path/to/this/folder
```

```python
from trackformer_sb.inference.separator import Separator

separator = Separator.from_pretrained("path/to/this/folder")
paths = separator.separate_file("song.mp3", out_folder="stems")
```

Neither runs code of this folder. `hyperparams.yaml` is code, for interfaces
that load it: `separate_batch` of SpeechBrain's `SepformerSeparation` gives the
stems in this order.
"""

YAML_ONLY = """
This separator is no Performer on an STFT: it has no `config.json` and loads
from its yaml only.
"""

LIMITS = """
## Limits

- The outputs have no names: MixIT does not tell which of them are the drums.
  An instrument can be spread over several outputs, and several can share one.
- The model works at {sample_rate} Hz. Files of other rates are resampled;
  what it cannot represent is distributed evenly over the outputs.
- Channels share their masks, which are predicted from the mean of them.
- Long files are separated in chunks. Outputs are aligned where chunks overlap,
  so that silence or a change of the music there can swap them.
"""


def separator_title(name, num_spks, sample_rate):
    """The first line of card and yaml.

    Example
    -------
    >>> separator_title("MaskNet", 4, 44100)
    'MaskNet separator: 4 outputs at 44100 Hz'
    """
    return f"{name} separator: {num_spks} outputs at {sample_rate} Hz"


def named_title(classes, sample_rate):
    """The first line of card and yaml of a separator of named stems."""
    return f"Separator of {', '.join(classes)} at {sample_rate} Hz"


def named_card(classes, sample_rate, metadata=None):
    """The card of a separator of named stems.

    Arguments
    ---------
    classes : list of str
        Names of the stems.
    sample_rate : int
        In Hz.
    metadata : dict, optional
        Sections: title -> text, or a dict as a table.

    Returns
    -------
    str
        Markdown with YAML front matter.
    """
    title = named_title(classes, sample_rate)
    return (
        FRONT.format(title=title)
        + NAMED.format(stems=", ".join(classes))
        + card_sections(metadata or {})
    )


def separator_card(title, num_spks, sample_rate, metadata=None, plain=True):
    """The card of a separator.

    Arguments
    ---------
    title : str
        See ``separator_title``.
    num_spks : int
        Number of outputs.
    sample_rate : int
        In Hz.
    metadata : dict, optional
        Sections: title -> text, or a dict as a table.
    plain : bool
        Whether it loads without its yaml.

    Returns
    -------
    str
        Markdown with YAML front matter.

    Example
    -------
    >>> card = separator_card("A separator", 4, 44100, {"Test": {"sdr": 5.1}})
    >>> card_tables(card)
    {'Test': {'sdr': '5.1'}}
    """
    values = {
        "title": title,
        "num_spks": num_spks,
        "sample_rate": sample_rate,
    }
    return (
        FRONT.format(**values)
        + UNNAMED.format(**values)
        + (PLAIN if plain else YAML_ONLY)
        + card_sections(metadata or {})
        + LIMITS.format(**values)
    )


def card_sections(metadata):
    """Sections of a model card.

    Arguments
    ---------
    metadata : dict
        Title -> text, or a dict as a table.

    Returns
    -------
    str
        Markdown.

    Example
    -------
    >>> print(card_sections({"Test": {"sdr": 5.1}}))
    <BLANKLINE>
    ## Test
    <BLANKLINE>
    | | |
    |---|---|
    | sdr | 5.1 |
    <BLANKLINE>
    """
    sections = []
    for name, content in metadata.items():
        if isinstance(content, dict):
            rows = [f"| {key} | {value} |" for key, value in content.items()]
            content = "\n".join(["| | |", "|---|---|", *rows])
        sections.append(f"\n## {name}\n\n{content}\n")
    return "".join(sections)


def card_tables(card):
    """The tables of a model card, as ``card_sections`` writes them.

    Arguments
    ---------
    card : str
        Markdown.

    Returns
    -------
    dict
        Title of the section -> dict of name -> text.
    """
    tables, title = {}, ""
    for line in card.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 4 and cells[1].strip("-"):
            tables.setdefault(title, {})[cells[1]] = cells[2]
    return tables
