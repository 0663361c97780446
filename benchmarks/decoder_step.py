r"""A step of stage 1 with every loss on: gradients taken at the image, beside the loss differentiated as a whole.

    python benchmarks/decoder_step.py --decoder ViT-B --batch 4
    python benchmarks/decoder_step.py --decoder ViT-XL --batch 64 --micro-batch 16 --recompute --precision bf16 \
        --device cuda

Networks in their published shapes with random weights: DINOv2-S tokens of 256 px images, VGG16, DINO-S/8. "plain" is
what the authors' script does: both losses are differentiated at the decoder's last layer for lambda, and their sum once
more as a whole, so that the networks that judge are traversed backwards twice. Repetitions are interleaved; each way's
peak memory is that of a process of its own (CPU) or of torch's allocator (CUDA).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from cpu import status
from models import save_encoder
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rae import Decoder, load_encoder
from rae.autoencoder.families import IMAGENET
from rae.data.order import augmentation_draws
from rae.evaluation.lpips import LPIPS
from rae.training.decoder import DecoderRecipe
from rae.training.diffaug import diffaug
from rae.training.objective import Objective, Part
from rae.training.run import DTYPES, Run


def save_dino(folder: Path) -> None:
    """DINO-S/8 in its published shape, with random weights."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, patch_size=8,
        hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
    )


class Setting:
    """Decoder, judges and one batch."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        device = torch.device(arguments.device)
        self.encoder = load_encoder(folder / "encoder", image_size=256, mean=IMAGENET[0], std=IMAGENET[1]).to(device)
        recipe = DecoderRecipe.model_validate(
            {
                "encoder": {"name": str(folder / "encoder"), "image_size": 256},
                "decoder": {"size": arguments.decoder, "patch_size": 16},
                "data": {"source": "digits"},
                "loss": {
                    "perceptual": {"kind": "encoder"},  # exchanged for LPIPS below: its files may not be here
                    "adversarial": {
                        "start": "0st",
                        "discriminator": {
                            "features": str(folder / "dino"), "start": "0st", "precision": arguments.precision,
                            "optim": {"lr": 2e-4},
                        },
                    },
                },
                "optim": {"lr": 2e-4, "ema": 0.99},
                "run": {
                    "duration": "1000st", "batch": arguments.batch, "micro_batch": arguments.micro_batch,
                    "precision": arguments.precision, "recompute": arguments.recompute,
                },
            }
        )  # fmt: skip
        self.run = Run(folder / "run", recipe, epoch=1000)
        torch.manual_seed(0)
        config = recipe.decoder.describe(self.encoder.config)
        self.decoder = Decoder(config).to(device)
        self.objective = Objective(recipe.loss, self.encoder, config.patch_size, self.run, seed=0, epoch=1000)
        self.lpips = LPIPS().to(device)
        for weight in self.lpips.weights:
            weight.fill_(1.0)
        self.objective._lpips = self.lpips
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(arguments.batch, 3, 256, 256, generator=generator).to(device)
        tokens = torch.randn(arguments.batch, 256, 384, generator=generator).to(device)
        positions = torch.arange(arguments.batch)
        pieces = (x.split(self.run.micro_batch) for x in (image, tokens, positions))
        self.parts = [Part(image, tokens, tokens, positions.tolist()) for image, tokens, positions in zip(*pieces)]
        self.dtype = DTYPES[arguments.precision]

    def at_the_image(self) -> Tensor:
        self.decoder.zero_grad(set_to_none=True)
        self.objective.backward(self.decoder, self.parts)
        self.objective._shown = []
        return self.decoder.head.weight.grad

    def plain(self) -> Tensor:
        """The whole batch at once: lambda is of the whole batch, and there is no other way to have it."""
        decoder, encoder = self.decoder, self.encoder
        decoder.zero_grad(set_to_none=True)
        image, tokens = (torch.cat([getattr(part, name) for part in self.parts]) for name in ("image", "noisy"))
        positions = [position for part in self.parts for position in part.positions]
        x = encoder.denormalise(decoder(tokens, dtype=self.dtype, recompute=self.run.config.recompute))
        reconstruction = (x - image).abs().mean() + self.lpips(image * 2 - 1, x * 2 - 1).mean()
        fake = diffaug(x * 2 - 1, augmentation_draws(positions, 0, 0).to(x.device))
        adversarial = -self.objective._adversary.heads(fake).mean()
        last: nn.Parameter = decoder.head.weight
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
        (reconstruction + 0.75 * norms[0] / (norms[1] + 1e-6) * adversarial).backward()
        return last.grad

    def discriminator_step(self) -> None:
        self.objective._shown = [(part, None) for part in self.parts]
        self.objective.train_adversary(self.decoder)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run, device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def peak(setting: Setting, way: str, device: str) -> float:
    """MiB above what models and batch take."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        getattr(setting, way)()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = status("VmRSS")
    getattr(setting, way)()
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default="ViT-B")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if arguments.peak:
        print(peak(Setting(arguments.folder, arguments), arguments.peak, arguments.device))
        return
    ways = ["at_the_image", "plain"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_encoder(folder / "encoder")
        save_dino(folder / "dino")
        setting = Setting(folder, arguments)
        gradients = {way: getattr(setting, way)().clone() for way in ways}
        times = {way: [] for way in [*ways, "discriminator_step"]}
        for _ in range(arguments.repeats):
            for way, measured in times.items():
                measured.append(seconds(getattr(setting, way), arguments.device))
        peaks = {}
        for way in ways:
            if arguments.device == "cuda":
                peaks[way] = peak(setting, way, "cuda")
            else:
                command = [sys.executable, __file__, *sys.argv[1:], "--peak", way, "--folder", str(folder)]
                peaks[way] = float(
                    subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
                )
    table = Table(title=f"{arguments.decoder}, batch {arguments.batch}, {arguments.precision}, {arguments.device}")
    for column in ("", "s/step", "images/s", "peak MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for way, measured in times.items():
        median = statistics.median(measured)
        memory = f"{peaks[way]:.0f}" if way in peaks else ""
        table.add_row(way.replace("_", " "), f"{median:.2f}", f"{arguments.batch / median:.2f}", memory)
    Console(width=100).print(table)
    ratios = [ours / theirs for ours, theirs in zip(times["at_the_image"], times["plain"])]
    difference = (gradients["at_the_image"] - gradients["plain"]).norm() / gradients["plain"].norm()
    print(
        f"time at the image / plain: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}); "
        f"gradients of the last layer differ by {difference:.1e} of their norm"
    )


if __name__ == "__main__":
    main()
