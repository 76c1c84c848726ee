"""One training step, alone or as one of the ranks of torchrun.

Arguments: a folder. Each rank trains on its share of the same batch and
leaves its weights and gradients as rank0.pt, rank1.pt there.
"""

import os
import pathlib
import sys

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch

sys.path.insert(0, str(pathlib.Path(__file__).parent))


def mixtures():
    """A batch of four items of two mixtures."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 2, 2000, generator=generator)


def one_step(folder, batch):
    """Trains one step with the recipe's Brain."""
    from test_recipes import ROOT, recipe, tiny

    from trackformer_sb.training.experiment import load_hparams, parse_arguments

    argv = tiny("performer_mixit.yaml", "none", folder, dropout=0.0)
    _, run_opts, overrides = parse_arguments(
        [*argv, "--distributed_backend=gloo"]
    )
    hparams = load_hparams(
        str(ROOT / "hparams" / "performer_mixit.yaml"), overrides
    )
    sb.utils.distributed.ddp_init_group(run_opts)

    class Recorder(recipe.Separation):
        def __init__(self, **options):
            # without data
            sb.Brain.__init__(self, **options)
            self.rank, self.num_processes = 0, 1

        def optimizers_step(self):
            self.gradient = {
                name: p.grad.clone()
                for name, p in self.hparams.MaskNet.named_parameters()
            }
            super().optimizers_step()

    brain = Recorder(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.num_batches, brain.num_steps = 10, 100
    brain.skipped = {}
    brain.tensorboard = hparams["tensorboard_logger"]().writer
    before = {k: v.clone() for k, v in hparams["MaskNet"].state_dict().items()}
    brain.on_fit_start()
    items = [
        {"id": str(i), "mixtures": x, "skipped": []}
        for i, x in enumerate(batch)
    ]
    brain.waiting = brain.last_batch_end = 0.0
    brain.step_seconds = []
    brain.fit_batch(PaddedBatch(items))
    return {
        "before": before,
        "gradient": brain.gradient,
        "weights": hparams["MaskNet"].state_dict(),
    }


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    folder = pathlib.Path(sys.argv[1])
    result = one_step(folder / "ranks", mixtures()[2 * rank : 2 * rank + 2])
    torch.save(result, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
