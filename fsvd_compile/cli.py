"""The `fsvd-compile` command: arguments in, one function of the package called, text out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

import torch

import fsvd_compile
from fsvd_compile import bench, families
from fsvd_compile.bench import decode, generate, models, tune
from fsvd_compile.errors import FlashSVDError, WrongResultError
from fsvd_compile.factorize import Refine, checkpoint

COMMAND = "fsvd-compile"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0, 1 where a result is wrong, 2 where the command cannot be carried out as
        given (argparse itself raises SystemExit with 2).
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except FlashSVDError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 1 if isinstance(error, WrongResultError) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(COMMAND, description=_summary(fsvd_compile))
    parser.add_argument("--version", action="version", version=fsvd_compile.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    benches = commands.add_parser("bench", help="measure").add_subparsers(
        metavar="WHAT", required=True
    )
    _add_decode(benches)
    _add_generate(benches)
    _add_tune(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_factorize(commands)
    return parser


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    summary = "what a checkpoint of an SVD family holds: family, ranks, sizes, what is dense"
    parser = commands.add_parser("inspect", help=summary, description=summary)
    parser.add_argument("source", help="a directory, or one weight file")
    parser.add_argument(
        "--skip-spectra",
        dest="spectra",
        action="store_false",
        help="do not look for dense weights of low rank (saves time)",
    )
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    print(families.inspect(args.source, spectra=args.spectra))
    return 0


def _add_convert(commands: argparse._SubParsersAction) -> None:
    summary = "read a checkpoint of an SVD family and write it in the common format"
    parser = commands.add_parser("convert", help=summary, description=summary)
    parser.add_argument("source", help="a directory, or one weight file")
    _add_out(parser)
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="a PEFT LoRA adapter: joined to factors, merged where dense",
    )
    parser.add_argument(
        "--no-merge",
        dest="merge",
        action="store_false",
        help="keep the adapter as a low-rank branch beside dense weights",
    )
    parser.add_argument(
        "--refactor",
        action="store_true",
        help="hold dense weights of low rank as factors again (decomposes them)",
    )
    parser.set_defaults(run=_convert)


def _add_out(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that writes a model directory."""
    parser.add_argument("out", help="the directory to write, which must not exist or be empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of all parameters (default: the model's own)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _convert(args: argparse.Namespace) -> int:
    found = families.convert(
        args.source,
        args.out,
        adapter=args.adapter,
        merge=args.merge,
        refactor=args.refactor,
        dtype=_dtype(args),
        overwrite=args.overwrite,
    )
    print(found)
    print(f"written to {args.out}; load it after `import fsvd_compile`")
    return 0


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    return None if args.dtype is None else getattr(torch, args.dtype)


def _add_factorize(commands: argparse._SubParsersAction) -> None:
    summary = "factorize a dense language model with calibration text and write the common format"
    parser = commands.add_parser("factorize", help=summary, description=summary)
    add = parser.add_argument
    add("model", help="a directory that AutoModelForCausalLM loads")
    _add_out(parser)
    add(
        "--keep", type=float, default=0.5, help="share of parameters of all linear layers but the "
        "head, in (0, 1] (default %(default)s)",
    )  # fmt: skip
    add("--calibration", metavar="FILE", help="a text file; without one, plain SVD")
    add("--length", type=int, default=512, help="tokens of a window (default %(default)s)")
    add("--windows", type=int, default=64, help="windows at the most (default %(default)s)")
    add(
        "--allocation", choices=("uniform", "loss"), help="one share for every layer, or ranks where "
        "they save the most loss (default: loss with calibration)",
    )  # fmt: skip
    add(
        "--layerwise", action="store_true", help="collect covariances layer by layer: less memory, the "
        "same factors",
    )  # fmt: skip
    add(
        "--feedback", action="store_true", help="fit each layer behind the factorized ones before it, "
        "so that it makes up for them",
    )  # fmt: skip
    add(
        "--refine", type=int, metavar="STEPS", help="with --feedback: train the factors of each layer "
        "for so many steps of AdamW, a window each",
    )  # fmt: skip
    add("--lr", type=float, default=Refine.lr, help="of --refine (default %(default)s)")
    add(
        "--resume", metavar="DIR", help="with --layerwise or --feedback: keep finished layers there, and take "
        "those that an interrupted run of the same command left",
    )  # fmt: skip
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default %(default)s)",
    )
    parser.set_defaults(run=_factorize)


def _factorize(args: argparse.Namespace) -> int:
    report = checkpoint.factorize_checkpoint(
        args.model,
        args.out,
        args.keep,
        calibration=args.calibration,
        length=args.length,
        count=args.windows,
        allocation=args.allocation or ("loss" if args.calibration else "uniform"),
        layerwise=args.layerwise,
        feedback=args.feedback,
        refine=None if args.refine is None else Refine(steps=args.refine, lr=args.lr),
        resume=args.resume,
        dtype=_dtype(args),
        device=args.device,
        overwrite=args.overwrite,
    )
    print(report)
    print(f"written to {args.out}; load it after `import fsvd_compile`")
    return 0


def _add_model(parser: argparse.ArgumentParser, default: decode.Setting | type) -> None:
    """The arguments that say of which model the time is measured; `default` has the values of those not given."""
    add = parser.add_argument
    add(
        "--model",
        help=f"{', '.join(models.MODELS)}: that shape with random weights; or a directory that "
        "AutoModelForCausalLM.from_pretrained loads, whose linear layers are replaced by random "
        "factors if --keep is below 1, as time does not depend on values "
        f"(default {default.model})",
    )
    add(
        "--keep",
        type=float,
        default=default.keep,
        help="share of the parameters of every linear layer but the head, in (0, 1]; 1 leaves the "
        "model dense, with its own weights (default %(default)s)",
    )
    add(
        "--round",
        type=int,
        default=default.round,
        help="ranks are rounded down to a multiple of this; 1 takes them as they come, such as "
        "819 (default %(default)s)",
    )


def _add_subject(parser: argparse.ArgumentParser, default: decode.Setting, context: str) -> None:
    """The arguments of a benchmark that say which model is measured, and where the rows go."""
    _add_model(parser, default)
    add = parser.add_argument
    add("--batch", type=int, default=default.batch, help="sequences (default %(default)s)")
    add("--context", type=int, default=default.context, help=f"{context} (default %(default)s)")
    add("--device", default=default.device, help="cpu or cuda (default %(default)s)")
    add(
        "--json",
        metavar="FILE",
        help="add the rows to FILE, replacing those of the same name and conditions",
    )


def _add_decode(benches: argparse._SubParsersAction) -> None:
    summary = _summary(decode)
    parser = benches.add_parser("decode", help=summary, description=summary)
    default = decode.Setting(device="cuda" if torch.cuda.is_available() else "cpu")
    _add_subject(parser, default, "tokens of each sequence in the KV cache before a block of calls")
    add = parser.add_argument
    add(
        "--cache",
        type=int,
        help=f"positions of the KV cache (default: the context and {decode.ROOM} more)",
    )
    add(
        "--peers",
        type=_names,
        help=f"what to time, comma-separated, of {', '.join(decode.PEERS)}; dense-* run the dense "
        f"model of the same shape (default {','.join(default.peers)})",
    )
    add(
        "--rounds",
        type=int,
        default=default.rounds,
        help="blocks of calls per peer and timer (default %(default)s)",
    )
    add(
        "--calls", type=int, default=default.calls, help="timed calls a block (default %(default)s)"
    )
    add(
        "--skip-check",
        dest="check",
        action="store_false",
        help="do not compare logits with an fp32 copy (saves its memory)",
    )
    add(
        "--apart",
        action="store_true",
        help="each peer in a process of its own, one after the other, instead of all by turns in one",
    )
    parser.set_defaults(run=_decode)


def _decode(args: argparse.Namespace) -> int:
    names = ("model", "keep", "round", "batch", "context", "cache", "peers", "device", "rounds")
    names += ("calls", "check", "apart")
    return _measured(decode, args, names)


def _add_generate(benches: argparse._SubParsersAction) -> None:
    summary = _summary(generate)
    parser = benches.add_parser("generate", help=summary, description=summary)
    default = generate.Setting(device="cuda" if torch.cuda.is_available() else "cpu")
    _add_subject(parser, default.subject, "tokens of each prompt")
    add = parser.add_argument
    add("--new", type=int, default=default.new, help="new tokens (default %(default)s)")
    add(
        "--peers",
        type=_names,
        default=default.peers,
        help=f"what to time, comma-separated, of {', '.join(generate.PEERS)} "
        f"(default {','.join(default.peers)})",
    )
    add(
        "--rounds",
        type=int,
        default=default.rounds,
        help="timed calls per peer (default %(default)s)",
    )
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    names = ("model", "keep", "round", "batch", "context", "new", "peers", "device", "rounds")
    return _measured(generate, args, names)


def _add_tune(commands: argparse._SubParsersAction) -> None:
    summary = _summary(tune)
    parser = commands.add_parser("tune", help=summary, description=summary)
    add = parser.add_argument
    _add_model(parser, tune.Setting)
    add(
        "--tokens",
        type=lambda text: tuple(int(n) for n in _names(text)),
        default=tune.Setting.tokens,
        help="tokens of a step to tune for, comma-separated, at most 64 each "
        f"(default {','.join(map(str, tune.Setting.tokens))})",
    )
    add(
        "--jobs",
        type=int,
        default=tune.Setting.jobs,
        help="processes that compile ahead (default %(default)s)",
    )
    add("--json", metavar="FILE", help="write all that was tried to FILE")
    parser.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    names = ("model", "keep", "round", "tokens", "jobs")
    setting = tune.Setting(**{name: getattr(args, name) for name in names})
    path = tune.own_file()  # places that cannot be written are found before the measurement
    if args.json:
        bench.check_folder(args.json)
    found = []
    for one in tune.run(setting, say=lambda line: print(line, flush=True)):
        found.append(one)
        tune.keep([one], path)  # each at once: an interrupted run has done what it has done
        print(tune.table([one]).splitlines()[-1], flush=True)
    print(tune.table(found))
    print(f"{len(found)} rows in {path}, which every later process reads")
    if args.json:
        tune.save(found, args.json)
    return 0


def _measured(what: ModuleType, args: argparse.Namespace, names: Sequence[str]) -> int:
    """Runs a benchmark with the arguments of these names, prints its table and keeps its rows."""
    setting = what.Setting(**{name: getattr(args, name) for name in names})
    if args.json:
        bench.load(args.json)  # a file that cannot take the rows is found before the measurement
    rows = what.run(setting, say=lambda line: print(line, flush=True))
    print(what.table(rows))
    if args.json:
        bench.add(rows, args.json)
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _summary(module: object) -> str:
    return module.__doc__.partition("\n")[0]
