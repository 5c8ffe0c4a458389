"""The `kick` command. Only the standard library is imported before the arguments are understood.

Exit codes: 0 all done; 1 some evaluations failed (the rest is there), a check found a fault, or kick itself has one;
2 wrong usage or configuration; 130 interrupted (run the same command again to go on).
"""

import argparse
import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kick import __version__
from kick.errors import KickError

Command = Callable[[argparse.Namespace], int]

OK, FAULT, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code. Errors of the user's are printed without a traceback."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return USAGE
    quieten_libraries()
    try:
        with _ended_as_by_ctrl_c():
            _load_plugins(options.plugin)
            return _command(options.command)(options)
    except KickError as error:
        return _say(str(error), options.debug)
    except KeyboardInterrupt:
        with suppress(OSError):  # its terminal may be gone
            print("kick: interrupted. Run the same command again to go on where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (UnicodeDecodeError, OSError) as error:
        return _say(_in_words(error), options.debug)
    except Exception as error:  # nobody foresaw it
        said = f"{type(error).__name__}: {error}\n  A fault of kick, or of a plugin: --debug shows where."
        return _say(said, options.debug, FAULT)


def _say(error: str, debug: bool, code: int = USAGE) -> int:
    """Say what went wrong, and with --debug where. Gives the exit code."""
    if debug:
        traceback.print_exc()
    print(f"kick: error: {error}", file=sys.stderr)
    return code


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """What ends a process, and the end of its terminal, ends workers and jobs with it. nohup keeps its meaning."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        for other in wanted:  # a terminal that closes says so more than once: what is being ended is not disturbed
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    wanted = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in wanted:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in wanted:
            signal.signal(number, signal.SIG_DFL)


def _in_words(error: OSError | UnicodeDecodeError) -> str:
    """What the system refused, and what to do about it."""
    number, what = 0, str(error)
    if isinstance(error, OSError) and error.errno and error.filename:
        number, what = error.errno, f"{error.strerror}: {error.filename}"
    hints = {
        errno.EACCES: "Give yourself the permission (chmod), or name another file or folder.",
        errno.ENOSPC: "Free some space, or choose an --out on another disk.",
        errno.ENOTDIR: "A file stands where a folder is needed: name another.",
        errno.EISDIR: "A folder stands where a file is needed: name another.",
        errno.ENAMETOOLONG: "Choose a shorter name.",
        errno.EROFS: "That disk cannot be written: choose another --out.",
    }
    return f"{what}\n  {hints.get(number, '--debug shows where.')}"


def _command(name: str) -> Command:
    from kick import commands

    return getattr(commands, name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kick", description="What did a compressed language model lose, and how sure are we?"
    )
    parser.add_argument("--version", action="version", version=f"kick {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print machine-readable results on stdout")
    common.add_argument(
        "--plugin",
        action="append",
        type=Path,
        default=[],
        metavar="FILE.py",
        help="a file that defines compressors or suites",
    )
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(command=None, plugin=[], debug=False)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    def command(name: str, help: str, function: str = "", examples: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"for example:\n{examples}" if examples else None,
        )
        sub.set_defaults(command=function or name)
        return sub

    sweep = command(
        "sweep",
        "compress a model in many ways, ask each result the same questions, and report",
        examples="  kick sweep configs/demo.yaml --dry-run\n"
        "  kick sweep study.yaml --data DIR --set lm.batch_size=64 --set 'settings.0.levels=[0.5, \"2:4\"]'",
    )
    sweep.add_argument("config", type=Path, metavar="CONFIG.yaml", help="see docs/first-sweep.md")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/ and the file's name)")
    sweep.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key of the file, e.g. lm.batch_size=8; may be repeated, values are YAML",
    )
    sweep.add_argument("--data", metavar="DIR", help="where questions come from: a folder, 'embedded' or 'hub'")
    sweep.add_argument("--limit", type=_positive, metavar="N", help="at most N questions of each suite")
    sweep.add_argument(
        "--executor", choices=["local", "ray", "slurm", "inline"], help="where evaluations run (default: the file's)"
    )
    sweep.add_argument(
        "--dry-run", action="store_true", help="say what would run, what is there, and what it would cost"
    )
    sweep.add_argument("--fresh", action="store_true", help="throw away what the folder holds and start again")
    _tracker(sweep)

    compress = command(
        "compress",
        "write one compressed checkpoint",
        examples="  kick compress smollm2-135m wanda@2:4 --out checkpoints/wanda\n"
        "  kick compress DIR 'wanda@0.5 > gptq@4' --param calibration.samples=64 --out checkpoints/both",
    )
    compress.add_argument("model", metavar="MODEL", help="a model, or a sweep file that names one")
    compress.add_argument(
        "setting", metavar="SETTING", help="for example wanda@0.5 or magnitude@2:4; of a sweep file one of its own"
    )
    compress.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is empty or not there")
    compress.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="K=V",
        help="a parameter of the compressor, or calibration.K=V; may be repeated, values are YAML",
    )
    compress.add_argument("--stream", action="store_true", help="read block by block: needs memory for two blocks only")
    _precision(compress)

    evaluate = command(
        "evaluate",
        "ask one model or checkpoint the questions of some suites",
        examples="  kick evaluate checkpoints/wanda --suite mmlu,perplexity --data embedded --out runs/wanda\n"
        "  kick evaluate owner/name --suite lm_eval:arc_easy --limit 200 --param shots=5 --out runs/arc",
    )
    evaluate.add_argument(
        "model", metavar="MODEL_OR_CHECKPOINT", help="a hub id, a folder, a .gguf file or a packaged model"
    )
    evaluate.add_argument("--suite", required=True, metavar="NAME[,NAME]", help="`kick list suites` names them")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="at most N questions of each suite")
    evaluate.add_argument("--data", default="hub", metavar="DIR", help="a folder, 'embedded' or 'hub' (default)")
    evaluate.add_argument(
        "--lm", default="fast", metavar="NAME", help="which LM answers: fast (default), vllm or server"
    )
    evaluate.add_argument("--batch-size", type=_positive, default=128, metavar="N", help="questions asked in one go")
    evaluate.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="K=V",
        help="a parameter of the suite, SUITE.K=V, or lm.K=V; may be repeated, values are YAML",
    )
    evaluate.add_argument("--fresh", action="store_true", help="throw away what the folder holds and start again")
    evaluate.set_defaults(dry_run=False)
    _precision(evaluate)

    judge = command("judge", "have a judge grade the answers of a run, then report again")
    judge.add_argument("run", type=Path, metavar="RUN", help="the folder of a sweep")
    judge.add_argument("--judge", required=True, metavar="MODEL", help="the judge's name at its endpoint")
    judge.add_argument("--base-url", metavar="URL", help="an endpoint with the OpenAI chat protocol (default: OpenAI)")
    judge.add_argument("--budget", type=float, metavar="USD", help="never spend more on this run; needs --price")
    judge.add_argument("--price", metavar="IN,OUT", help="USD per million prompt and reply tokens, e.g. 2.5,10")
    judge.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="K=V",
        help="another key of the judge section (timeout=60, repeats=20), or SUITE.K=V",
    )
    judge.add_argument("--dry-run", action="store_true", help="say what would be asked, and what it would cost")

    report = command("report", "make tables, figures and report.html of a run again")
    report.add_argument("run", type=Path, metavar="RUN", help="the folder of a sweep")
    report.add_argument("--out", type=Path, metavar="DIR", help="write there instead of into the run")
    report.add_argument(
        "--figures",
        nargs="?",
        const="",
        metavar="NAME[,NAME]",
        help="only these (* fits any); without names: list them",
    )

    report.add_argument(
        "--perplexity-margin",
        type=_share,
        default=0.10,
        metavar="SHARE",
        help="how much perplexity may rise and look fine (default: 0.1)",
    )
    report.add_argument("--lm-eval", type=Path, metavar="DIR", help="also write results files as lm-eval's into DIR")
    _tracker(report)

    board = command("leaderboard", "several runs as one static site")
    board.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of sweeps")
    board.add_argument("--out", type=Path, default=Path("leaderboard"), metavar="DIR", help="default: leaderboard")

    compare = command(
        "compare",
        "two settings of a run side by side: paired tests and the answers that changed",
        examples="  kick compare runs/demo wanda@0.3 sparsegpt@0.3",
    )
    compare.add_argument("run", type=Path, metavar="RUN", help="the folder of a sweep")
    compare.add_argument("first", metavar="SETTING", help="as the leaderboard calls it")
    compare.add_argument("second", metavar="SETTING", help="what is compared with the first")
    compare.add_argument("--show", type=_whole, default=3, metavar="N", help="answers of each suite that changed")

    export = command("export", "write a checkpoint in another format: plain Hugging Face, packed GPTQ, GGUF")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what `kick compress` wrote")
    export.add_argument("--format", required=True, metavar="hf|gptq|gguf")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a directory, or a .gguf file")
    export.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16", "q8_0"],
        default="auto",
        help="of what is not packed; for gguf float16 (auto) or q8_0",
    )

    listing = command("list", "what is installed", "list_installed")
    listing.add_argument("what", choices=["compressors", "suites", "models", "lms"])

    doctor = command("doctor", "look at this machine, or whether an LM answers as `fast` does")
    doctor.add_argument("model", nargs="?", metavar="MODEL", help="what an LM is asked about")
    doctor.add_argument(
        "--lm", metavar="NAME", help="compare this LM with `fast`, or `fast` with lm-eval's hf, on MODEL"
    )
    doctor.add_argument("--param", action="append", default=[], metavar="lm.K=V", help="a parameter of the LM")
    _precision(doctor)

    inspect = command("inspect", "print a checkpoint's record and check that it is still true", "inspect_checkpoint")
    inspect.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what `kick compress` wrote")
    return parser


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a share such as 0.1, not '{text}'")
    return share


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 on")
    return int(text)


def _tracker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-to", choices=["mlflow", "wandb"], help="log the results of every setting there too")


def _precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="float32 on a CPU, bfloat16 on CUDA if auto",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive whole number")
    return int(text)


def quieten_libraries() -> None:
    """Progress bars and advice of libraries would bury ours. What the user set stays."""
    for key, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "LOGLEVEL": "ERROR",
    }.items():
        os.environ.setdefault(key, value)
    logging.getLogger("lm_eval").setLevel(os.environ["LOGLEVEL"])


def _load_plugins(paths: list[Path]) -> None:
    if paths:
        from kick import plugins

        for path in paths:
            plugins.load_file(path)


if __name__ == "__main__":
    sys.exit(main())
