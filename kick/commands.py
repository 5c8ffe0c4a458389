"""What each command does: read its options, call the stage, print the result."""

import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kick import checkpoint as checkpoints
from kick import devices, distributed, models, sweep_file
from kick.calibration import CalibrationSpec
from kick.compress import Recipe, prepare
from kick.compress import compress as make_checkpoint
from kick.config import SuiteSpec, SweepConfig
from kick.errors import CheckpointError, ConfigError, DiskFullError, KickError, RunError, TrackerError, unknown_name
from kick.export import find_format
from kick.files import check_own, check_writable, safe_name, to_json
from kick.judge.spec import JudgeSpec
from kick.listing import LISTS
from kick.lm.spec import LMSpec
from kick.options import accepted, compress_params, judge_spec, lm_params, split_params
from kick.progress import Silent, display, duration
from kick.settings import Setting, parse_setting
from kick.spec import validated
from kick.sweep.executors.spec import ExecutorSpec

if TYPE_CHECKING:
    from kick.sweep.plan import Plan


def sweep(options: Namespace) -> int:
    _check_tracker(options)
    config = sweep_file.load(options.config, options.overrides)
    if options.data is not None:
        config = config.model_copy(update={"data": options.data})
    if options.limit:
        suites = tuple(
            s.model_copy(update={"limit": min(options.limit, s.limit or options.limit)}) for s in config.suites
        )
        config = config.model_copy(update={"suites": suites})
    if name := options.executor or os.environ.get("KICK_EXECUTOR"):
        where = "--executor" if options.executor else "KICK_EXECUTOR"
        own = config.executor.params if name == config.executor.name else {}  # another one's say nothing here
        changed = {**config.executor.model_dump(), "name": name, "params": own}
        config = config.model_copy(update={"executor": validated(ExecutorSpec, changed, where)})
    out = options.out or Path("runs") / options.config.stem
    if isinstance(config.model, str):
        return _run_one(config, out, options)
    return _run_models(config, out, options)


def _run_models(config: SweepConfig, out: Path, options: Namespace) -> int:
    """A run of its own for each model, in a folder of its name, and a leaderboard of all."""
    from kick.sweep.plan import make_plan
    from kick.sweep.store import check_usable

    codes, documents = [], {}
    # whatever is wrong with one of them is said before the first is run
    plans = {}
    for name in config.models:
        needed = _needs_weights(out / safe_name(name), options)
        plans[name] = make_plan(config.model_copy(update={"model": name}), weights=needed)
    for name, plan in plans.items():
        check_usable(out / safe_name(name), plan, options.fresh)
        _check_beginning(plan, options)
    for name, plan in plans.items():
        try:
            code, text, documents[name] = _run(plan, out / safe_name(name), options)
        except (ConfigError, DiskFullError):  # for all
            raise
        except KickError as error:  # of one model: the others go on
            code, text, documents[name] = 1, "", {"error": str(error)}
            print(f"kick: {name}: {error}", file=sys.stderr)
        codes.append(code)
        if text and not options.json:  # as each ends
            _print_text(text)
    if not options.dry_run:
        from kick.report.leaderboard import write_leaderboard

        try:
            write_leaderboard([out / safe_name(name) for name in config.models], out)
            print(f"All models: {out / 'index.html'}", file=sys.stderr)
        except RunError as error:  # each has its report
            print(f"kick: no leaderboard of all models: {error}", file=sys.stderr)
            codes.append(1)
    if options.json:
        _print_text(to_json({"models": documents}))
    return max(codes)


def _check_beginning(plan: "Plan", options: Namespace) -> None:
    """Raise KickError, before a folder is begun, for what is wrong with the model, with a target for it, or where works
    could not be begun from here.
    """
    from kick.sweep.executors import find_executor

    plan.check_model()
    plan.parameters  # noqa: B018
    plan.training  # noqa: B018
    if not options.dry_run:
        find_executor(plan.config.executor).check_here(plan.config.executor)


def _run_one(config: SweepConfig, out: Path, options: Namespace, as_is: bool = False) -> int:
    from kick.sweep.plan import make_plan

    plan = make_plan(config, as_is, weights=_needs_weights(out, options))
    _check_beginning(plan, options)
    code, text, document = _run(plan, out, options)
    _print(options, text, document)
    return code


def _needs_weights(out: Path, options: Namespace) -> bool:
    """A run is of certain weights: what it lacks is only known once these are there."""
    from kick.sweep.store import RUN

    return not options.dry_run or (out / RUN).is_file()


def evaluate(options: Namespace) -> int:
    names = [name.strip() for name in options.suite.split(",") if name.strip()]
    if not names:
        raise ConfigError("--suite names no suite.", "For example --suite mmlu,perplexity.")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"--suite names '{twice[0]}' twice.", "Each is asked once.")
    of_lm, params = lm_params(options.param)
    shared, own = split_params(params, names)
    suites = tuple(
        SuiteSpec(suite=name, params={**known, **own.get(name, {})}, limit=options.limit)
        for name, known in zip(names, accepted(names, shared), strict=True)
    )
    config = SweepConfig(
        model=options.model,
        settings=(),
        suites=suites,
        data=options.data,
        lm=LMSpec(name=options.lm, batch_size=options.batch_size, params=of_lm),
        dtype=options.dtype,
        device=options.device,
        executor=ExecutorSpec(name="inline"),  # one model: nothing to share out
    )
    return _run_one(config, options.out, options, as_is=True)


def _run(plan: "Plan", out: Path, options: Namespace) -> tuple[int, str, dict[str, Any]]:
    """(exit code, what to say, the same as a document)."""
    from kick.sweep.costs import remarks
    from kick.sweep.estimate import describe
    from kick.sweep.run import run
    from kick.sweep.store import Store

    config = plan.config
    if options.dry_run:
        return 0, *describe(plan, out, options.fresh)
    for remark in remarks(plan):
        print(f"kick: {remark}", file=sys.stderr)
    watching = display()
    with Store.open(out, plan, fresh=options.fresh) as store:
        try:
            summary = run(plan, store, watching, debug=options.debug)
        finally:
            watching.close()
    unjudged, judge_error = 0, None
    if config.judge is not None:
        try:
            unjudged = sum(_judge(out, config.judge).failed.values())
        except KickError as error:  # the answers are there, and so is their report
            judge_error = str(error)
    from kick.report import tables, write_report

    results = write_report(out)
    tracker_error = None
    try:
        _log(options, results, out)
    except TrackerError as error:
        tracker_error = str(error)
    document = {
        "run": str(out),
        "report": str(out / "report.html"),
        "evaluations": summary.evaluations,
        "already_done": summary.already,
        "done": summary.done,
        "failed": summary.failed,
        "unjudged": unjudged,
        "judge_error": judge_error,
        "tracker_error": tracker_error,
        "leaderboard": tables.leaderboard(results),
    }
    text = tables.leaderboard_markdown(results) + f"\nReport: {out / 'report.html'}"
    if summary.failed:
        text += (
            f"\n{len(summary.failed)} of {summary.evaluations} evaluations failed; the same command tries them again."
        )
    if unjudged:
        text += f"\n{unjudged} questions have no answer of the judge; the same command asks them again."
    if config.judge is None and (lacking := results.not_judged):
        text += f"\n{len(lacking)} evaluations are not judged yet, {lacking[0]} among them: kick judge {out}"
    if judge_error:
        text += f"\nThe judge could not grade: {judge_error}"
    if tracker_error:
        text += f"\n{tracker_error}"
    return (1 if summary.failed or unjudged or judge_error or tracker_error else 0), text, document


def compress(options: Namespace) -> int:
    model, setting, calibration = _what_to_compress(options)
    prepare(setting)
    source = models.find_source(model)
    check_writable(options.out)
    if options.out.exists() and any(options.out.iterdir()):
        raise ConfigError(f"{options.out} is not empty.", "Choose another --out.")
    asked = devices.default_device() if options.device == "auto" else options.device
    device, dtype = devices.choose(distributed.own_device(asked), options.dtype)
    distributed.begin(device)
    recipe = Recipe.of(source, setting, calibration, dtype, device, options.stream)
    watching = display() if distributed.is_main() else Silent()

    def progress(done: int, total: int, what: str, detail: str = "") -> None:
        watching.step(f"{setting.name}: {what}", done, total, None, detail)

    try:
        made = make_checkpoint(recipe, options.out, progress)
    finally:
        watching.close()
        distributed.end()
    return _print(options, _describe_checkpoint(made), made.record) if distributed.is_main() else 0


def _what_to_compress(options: Namespace) -> tuple[str, Setting, CalibrationSpec]:
    """Model, setting and calibration, from the arguments or from a sweep file that holds a setting of that name."""
    from kick.sweep.sizes import with_sizes_as_levels

    if not options.model.endswith((".yaml", ".yml")):
        asked = parse_setting(options.setting)
        own, calibration = compress_params(options.param, [stage.compressor for stage in asked.stages])
        first, *then = (stage.model_copy(update={"params": own[stage.compressor]}) for stage in asked.stages)
        setting = Setting(compressor=first.compressor, level=first.level, params=first.params, then=tuple(then))
        return options.model, setting, calibration
    config = sweep_file.load(Path(options.model))
    if options.param:
        raise ConfigError(f"--param {options.param[0]} beside {options.model}.", "Change it in the file.")
    if not isinstance(config.model, str):
        raise ConfigError(f"{options.model} names several models.", "Give one of them, and the setting with --param.")
    options.dtype = config.dtype if options.dtype == "auto" else options.dtype
    options.device = config.device if options.device == "auto" else options.device
    found = {setting.name: setting for setting in config.all_settings()}
    if options.setting not in found:  # it may be one that is named by a size
        _, dtype = devices.choose(options.device, options.dtype)
        found = {setting.name: setting for setting in with_sizes_as_levels(config, dtype).all_settings()}
    if options.setting not in found:
        raise unknown_name("setting", options.setting, found, f"{options.model} names them.")
    setting = found[options.setting]
    return config.model, setting, setting.calibration or config.calibration


def judge(options: Namespace) -> int:
    spec = judge_spec(options)
    if options.dry_run:
        from kick.judge.estimate import estimate_cost
        from kick.judge.run import reference_verdicts

        spec.check()
        reference_verdicts(spec)  # a file of them that is not there is said now, too
        cost = estimate_cost(options.run, spec)
        usd = "unknown without --price" if cost["estimated_usd"] is None else f"about {cost['estimated_usd']:.2f} USD"
        tokens = f"{cost['estimated_prompt_tokens']:,} + {cost['estimated_output_tokens']:,} tokens"
        text = (
            f"{cost['to_ask']} of {cost['questions']} questions for {spec.model}: {cost['cached']} answered before, "
            f"{cost['settled_by_rule']} need no judge\n{tokens}, {usd}"
        )
        return _print(options, text, cost)
    outcome = _judge(options.run, spec)
    from kick.report import tables, write_report

    results = write_report(options.run)
    failed = sum(outcome.failed.values())
    text = (
        f"{tables.leaderboard_markdown(results)}\n{outcome.asked} questions asked of {spec.model}, {outcome.cached} "
        f"answered before, {failed} without an answer"
        + "".join(f"\n  {count} {reason}" for reason, count in sorted(outcome.failed.items()))
        + (f"\n{outcome.stopped}; the same command with a larger budget goes on." if outcome.stopped else "")
        + f"\nReport: {options.run / 'report.html'}"
    )
    _print(options, text, outcome.record)
    return 1 if failed else 0


def _judge(run: Path, spec: JudgeSpec) -> Any:
    from kick.judge.run import judge_run

    watching = display()
    try:
        return judge_run(run, spec, watching)
    finally:
        watching.close()


def report(options: Namespace) -> int:
    from kick.report import tables, write_report

    if options.figures == "":
        return _list_figures(options)
    names = [name.strip() for name in (options.figures or "*").split(",")]
    if options.figures and options.out is None:
        return _draw_figures(options, names)
    if options.lm_eval:
        check_writable(options.lm_eval)
    results = write_report(options.run, options.out, names, options.perplexity_margin)
    if options.lm_eval:
        from kick.report.lm_eval import write_lm_eval

        write_lm_eval(results, options.lm_eval)
    out = options.out or options.run
    _log(options, results, out)
    document = {"report": str(out / "report.html"), "leaderboard": tables.leaderboard(results)}
    code = _print(options, tables.leaderboard_markdown(results) + f"\nReport: {out / 'report.html'}", document)
    for evaluation in (damaged := [own for own in results.evaluations.values() if own.damaged]):
        print(f"kick: {evaluation.setting} on {evaluation.suite}: {evaluation.reason}", file=sys.stderr)
    return 1 if damaged else code


def _check_tracker(options: Namespace) -> None:
    """What would fail after hours is said at once."""
    if getattr(options, "log_to", None):
        from kick.report.trackers import check

        check(options.log_to)


def _log(options: Namespace, results: Any, report: Path) -> None:
    if getattr(options, "log_to", None):
        from kick.report.trackers import log_to

        log_to(options.log_to, results, report)


def _list_figures(options: Namespace) -> int:
    from kick.report.figures import planned
    from kick.report.results import read_results

    rows = [{"name": figure.name, "title": figure.title} for figure in planned(read_results(options.run))]
    return _print(options, "\n".join(row["name"] for row in rows), rows)


def _draw_figures(options: Namespace, names: Sequence[str]) -> int:
    """Some figures anew into the run; its page keeps all of them."""
    from kick.report.figures import choose, draw
    from kick.report.results import read_results
    from kick.sweep.store import alone_in

    if options.lm_eval or options.log_to:
        raise ConfigError(
            f"--figures {options.figures} draws nothing but figures into {options.run}.",
            "Give --out for a whole report.",
        )
    with alone_in(options.run):
        results = replace(read_results(options.run), perplexity_margin=options.perplexity_margin)
        chosen = choose(results, names)
        drawn = draw(chosen, options.run / "figures")
    rows = [{"name": own.name, "file": str(own.svg)} for own in drawn]
    code = _print(options, "\n".join(row["file"] for row in rows), rows)
    return code if len(drawn) == len(chosen) else 1


def leaderboard(options: Namespace) -> int:
    from kick.report.leaderboard import write_leaderboard

    check_own(options.out, "leaderboard.json")
    rows = write_leaderboard(options.runs, options.out)
    text = "\n".join(f"{row['place'] or '–':>3}  {row['model']}  {row['setting']}" for row in rows)
    return _print(options, f"{text}\nSite: {options.out / 'index.html'}", rows)


def compare(options: Namespace) -> int:
    from kick.report.pairs import in_words, pairs
    from kick.report.results import read_results

    found = pairs(read_results(options.run), options.first, options.second)
    document = {"first": options.first, "second": options.second, "suites": [pair.as_row() for pair in found]}
    return _print(options, in_words(found, options.first, options.second, options.show), document)


def export(options: Namespace) -> int:
    write = find_format(options.format)
    found = checkpoints.read(options.checkpoint)
    if problems := checkpoints.verify(found):
        raise CheckpointError(f"{found.path} is not what its record says: {problems[0]}.", "Compress again.")
    check_writable(options.out.parent if options.out.suffix == ".gguf" else options.out)
    if options.out.exists() and (options.out.is_file() or any(options.out.iterdir())):
        raise ConfigError(f"{options.out} is there already.", "Choose another --out.")
    written = write(found, options.out, options.dtype)
    files = [written] if written.is_file() else sorted(written.iterdir())
    size = sum(file.stat().st_size for file in files)
    document = {"format": options.format, "out": str(written), "bytes": size}
    return _print(
        options, f"{found.record['setting_name']} as {options.format} in {written}, {size / 1e6:,.1f} MB", document
    )


def doctor(options: Namespace) -> int:
    from kick.doctor import check_lm, examine

    if options.lm is None:
        if options.model is not None:
            raise ConfigError("a model is named, but no LM to compare on it.", "Add --lm NAME, or leave the model out.")
        if options.param or options.device != "auto" or options.dtype != "auto":
            raise ConfigError("--param, --device and --dtype are of an LM, and none is named.", "Add --lm NAME MODEL.")
        text, document = examine()
        _print(options, text, document)
        return 1 if document["broken"] else 0
    if options.model is None:
        raise ConfigError("--lm without a model.", "For example kick doctor --lm vllm smollm2-135m.")
    params, other = lm_params(options.param)
    if other:
        raise ConfigError(f"--param {other[0]}: whose parameter is it?", "For example --param lm.python=PATH.")
    text, document = check_lm(LMSpec(name=options.lm, params=params), options.model, options.dtype, options.device)
    _print(options, text, document)
    return 0 if document["agrees"] else 1


def list_installed(options: Namespace) -> int:
    rows = list(LISTS[options.what]())
    width = max((len(row["name"]) for row in rows), default=0)
    text = "\n".join(f"{row['name']:<{width}}  {row['description']}" for row in rows)
    return _print(options, text, rows)


def inspect_checkpoint(options: Namespace) -> int:
    found = checkpoints.read(options.checkpoint)
    problems = checkpoints.verify(found)
    text = _describe_checkpoint(found)
    text += (
        "\nverified: files and counts are as recorded"
        if not problems
        else "\nNOT as recorded:\n  " + "\n  ".join(problems)
    )
    _print(options, text, {**found.record, "problems": problems})
    return 1 if problems else 0


# Helpers


def _print(options: Namespace, text: str, document: Any) -> int:
    _print_text(to_json(document) if options.json else text)
    return 0


def _print_text(text: str) -> None:
    print(text.encode("utf-8", "replace").decode("utf-8"))  # answers of models may hold half characters


def _describe_checkpoint(found: checkpoints.Checkpoint) -> str:
    record = found.record
    lines = [
        f"{record['setting_name']} of {record['source']['name']} in {found.path}",
        f"sparsity {record['sparsity']:.4%} over {len(record['layers'])} linears, which hold "
        f"{record['coverage']['share']:.1%} of the blocks' weights",
        f"{record['parameters']:,} parameters, {record['bytes'] / 1e6:,.1f} MB, "
        f"{record['bits_per_weight']:g} bits a weight in the blocks",
        f"violations: {record['pattern_violations']} of a pattern, {record['grid_violations']} of a grid",
        f"made in {duration(record['seconds'])}, peak memory {record['peak_memory_bytes'] / 2**30:.2f} GiB, "
        f"{record['dtype']} on {record['device']}",
    ]
    for facts in (stage["facts"] for stage in record["stages"] if stage.get("facts", {}).get("format")):
        lines.append(_describe_brought(facts))
    if record["calibration"]:
        calibration = record["calibration"]
        lines.append(
            f"calibrated on {calibration['tokens']:,} tokens of {calibration['source']} ({calibration['fingerprint']})"
        )
    return "\n".join(lines + [f"warning: {warning}" for warning in record["warnings"]])


def _describe_brought(facts: dict[str, Any]) -> str:
    """Where a model made elsewhere comes from, and how its shape differs from the dense one's."""
    shape, dense = facts["shape"], facts["dense_shape"]
    changed = [f"{key} {shape[key]} (dense {dense[key]})" for key in shape if shape[key] != dense[key]]
    pattern = f", pattern {facts['pattern']}" if facts["pattern"] else ""
    return (
        f"made elsewhere: {facts['path']}, format {facts['format']}, {facts['bytes_as_brought'] / 1e6:,.1f} MB there"
        f"{pattern}\nshape: {', '.join(changed) or 'as dense'}"
    )
