"""Convert weights between the published PyTorch format and this package's parameters.

    python -m vvt_jax.convert vvt_small_224.pth folder/
    python -m vvt_jax.convert other.pth folder/ --set 'num_heads=(1,1,2,3)'
    python -m vvt_jax.convert --to-pytorch folder/ vvt_small.pth

Both published forms, the bare state dict and the training checkpoint, are read without PyTorch and
without executing anything in them. The size of the model is inferred from the shapes. They do not
determine the number of heads, so widths other than the published ones need --name or --set.

Linear weights are `[out, in]` in PyTorch and `[in, out]` here; convolution kernels are
`[out, in/groups, k, k]` in PyTorch and `[k, k, in/groups, out]` here, where the blocks of a stage
are also stacked.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vvt_jax.models import VVT
from vvt_jax.system.command_line import check_output, ending_in_a_sentence, parse_fields
from vvt_jax.system.errors import UserError
from vvt_jax.weights import torch_files
from vvt_jax.weights.model_card import variant_name
from vvt_jax.weights.pretrained import load_pretrained, save_pretrained
from vvt_jax.weights.published import from_pytorch, read_published, to_pytorch

__all__ = ["from_pytorch", "main", "to_pytorch"]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    with ending_in_a_sentence(options.target):
        fields = parse_fields(options.set)
        check_output(options.target, force=options.force)
        write = _write_published if options.to_pytorch else _write_folder
        told = write(options.source, options.target, options.name, fields)
    print(told)


def _write_folder(source: str, target: Path, name: str | None, fields: Mapping[str, Any]) -> str:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file, and a model folder is to go there.")
    model, variables, card = read_published(source, name, **fields)
    save_pretrained(target, model, variables, card)
    return f"{_describe(model, variables)} is in {target}."


def _write_published(source: str, target: Path, name: str | None, fields: Mapping[str, Any]) -> str:
    if target.is_dir():
        raise UserError(f"{target} is a folder, and a .pth file is to go there.")
    model, variables, _ = load_pretrained(source, name, **fields)
    torch_files.write_file(target, to_pytorch(variables, model))
    return f"{_describe(model, variables)} is in {target}."


def _describe(model: VVT, variables: Mapping[str, Any]) -> str:
    name = variant_name(model)
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(variables["params"]))
    size = f"{count:,} parameters, {model.num_classes} classes"
    return f"{name or 'A model'} ({size})"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vvt_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a .pth file; with --to-pytorch a model folder")
    parser.add_argument("target", type=Path, help="a folder; with --to-pytorch a .pth file")
    parser.add_argument("--to-pytorch", action="store_true", help="the way back")
    parser.add_argument("--name", help="of the model, where shapes don't tell or as a check")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the model"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
