"""`ropeway run`, `status`, `logs`, `plan` and `rehearse`: a run, before, while and after it happens."""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ropeway.cli.completion import complete_profile, complete_stage
from ropeway.cli.options import JsonOption, ProfileOption, open_profile
from ropeway.runtime.workspace import find_root

if TYPE_CHECKING:
    from ropeway.orchestration.run_summary import Result

run_app = typer.Typer()


@run_app.command()
def run(
    *,
    profile: ProfileOption = None,
    prefect: Annotated[bool, typer.Option(help="Record the run in Prefect, for its UI.")] = True,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Run the pipeline on a few records first; end if that fails.")
    ] = False,
    resume_from: Annotated[
        str | None,
        typer.Option(
            help="FINGERPRINT[@STEP] in .checkpoints: continue that run; written to params.yaml. Default: none."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object to stdout, all other lines to stderr.")
    ] = False,
) -> None:
    """Run every stage that is not up to date, publish the model, and move `candidate` to it if the gate passes."""
    from ropeway.config.load_params import load_profile

    output = sys.stdout
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        name = load_profile(find_root() / "params.yaml", profile)[0]
        print(f"{name}: starting. From another terminal: `ropeway status`, `ropeway logs -f`", flush=True)
        # After the first line: these imports take half a second, those of Prefect and DVC seconds.
        from ropeway.config import edit as edits
        from ropeway.orchestration.run_summary import print_result, result_json
        from ropeway.orchestration.sequence import ExitDeadline, run_retrain

        if resume_from is not None:
            edits.resume_from(find_root(), profile, resume_from)

        def show_json(result: "Result", page: str | None) -> None:
            print(json.dumps(result_json(result, page), indent=1, ensure_ascii=False), file=output, flush=True)

        ending = ExitDeadline(exits=True, show_result=show_json if as_json else print_result)
        run_retrain(find_root(), profile, use_prefect=prefect, rehearse=rehearse, ending=ending)


@run_app.command()
def status(*, profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """Show what runs, what ran, what a run would do and why, candidate and production, server, schedule and disk."""
    from ropeway.cli.status_output import describe_status, status_json
    from ropeway.orchestration.status import read_status
    from ropeway.runtime.terminal import show

    found = read_status(find_root(), profile)
    if as_json:
        typer.echo(json.dumps(status_json(found), indent=1, ensure_ascii=False))
    else:
        show(*describe_status(found))


@run_app.command()
def logs(
    stage: Annotated[
        str | None,
        typer.Argument(
            help="A stage. Default: the running one, else the one that ran last.", autocompletion=complete_stage
        ),
    ] = None,
    *,
    follow: Annotated[
        bool,
        typer.Option(
            "-f", "--follow", help="Also show new lines until the stage ends; without STAGE until the run ends."
        ),
    ] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Number of last lines to show.")] = 40,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Refuse a log of another profile. Default: that of the last run.", autocompletion=complete_profile
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line of the log.")] = False,
) -> None:
    """Show the last lines of a stage's log in .work/logs. Lines of ranks other than 0 start with their rank."""
    from ropeway.orchestration import log_reader

    root = find_root().resolve()
    chosen = log_reader.choose_stage(root, stage, profile)
    found = (
        log_reader.follow(root, stage, first=chosen, lines=lines)
        if follow
        else log_reader.read_tail(root, chosen, lines)
    )
    shown = None
    for one in found:
        if as_json:
            typer.echo(json.dumps(asdict(one), ensure_ascii=False))
            continue
        if follow and stage is None and one.stage != shown:
            typer.echo(f"-- {one.stage} --")
        shown = one.stage
        typer.echo(one.line if one.rank is None else f"[rank {one.rank}] {one.line}")


@run_app.command()
def plan(  # noqa: PLR0913 - a command's options
    *,
    profile: ProfileOption = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Training processes. Default: the GPUs of this machine, else 2.")
    ] = None,
    gpu_memory_gib: Annotated[
        float | None,
        typer.Option(min=0.1, help="Memory of one GPU in GiB. Default: this machine's GPU, else 40 and 80."),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            help="For hours: a100, h100, h100-pcie, h200, l40s, v100, cpu (this one), or a peak in TFLOPS. "
            "Default: this GPU; without one cpu if use_flash_attention is false, else a100."
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(help="Model FLOPS utilization for the estimate of hours, above 0 to 1. Default: 0.4."),
    ] = None,
    save_gbps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Bandwidth of checkpoints in GB/s, for hours. Default: measured on this disk."),
    ] = None,
    engine: Annotated[
        bool,
        typer.Option(
            help="Also run two steps of the first and the last rank in DeepSpeed's engine on tensors without "
            "memory, and compare their peaks with the plan. Minutes of CPU for 40 layers."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate a run without starting it: rows, steps, memory, disk, hours, and whether it fits."""
    from ropeway.planning.budget import CPU
    from ropeway.planning.measure import measure_cpu, measure_disk
    from ropeway.planning.plan import PlanRequest, plan_run
    from ropeway.planning.plan_text import describe_plan
    from ropeway.runtime.devices import count_ranks, list_gpus

    workspace, chosen = open_profile(profile)
    ranks = ranks or count_ranks()
    if card is None and not list_gpus() and not chosen.use_flash_attention:
        card = CPU  # the profile is for a CPU
    speed = measure_cpu(chosen.dtype, ranks) if card == CPU else None
    bandwidth = measure_disk(workspace.root) if save_gbps is None else save_gbps
    request = PlanRequest(gpu_memory_gib, card, mfu, bandwidth, save_measured=save_gbps is None, cpu_tflops=speed)
    planned = plan_run(workspace, chosen, ranks=ranks, request=request)
    if not engine:
        typer.echo(planned.as_json() if as_json else describe_plan(planned))
        return
    from ropeway.engine_rehearsal.compare import describe_rehearsal, read_and_rehearse

    if not as_json:
        typer.echo(describe_plan(planned))
        typer.echo("\nthe engine rehearses two steps of the first and the last rank: minutes for 40 layers", err=True)
    results = read_and_rehearse(workspace.root, chosen, ranks=ranks)
    if as_json:
        facts = {**json.loads(planned.as_json()), "engine": [asdict(result) for result in results]}
        typer.echo(json.dumps(facts, indent=1, sort_keys=True))
        return
    typer.echo("\n" + describe_rehearsal(results))


@run_app.command("rehearse")
def rehearse_command(
    *,
    profile: ProfileOption = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ranks of the real run, for its plan. Default: this machine's, or those that the batch states."
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder. Default: only after a failure.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole pipeline on a few records and steps in a folder of its own, and say where a real run would fail."""
    from ropeway.cli.rehearse_output import describe_rehearsed
    from ropeway.rehearse.rehearsal import rehearse as run_small

    def say(line: str) -> None:
        typer.echo(line, err=as_json)

    result = run_small(find_root(), profile, planned_ranks=ranks, keep=keep, write_line=say)
    typer.echo(json.dumps(result.to_json(), indent=1) if as_json else describe_rehearsed(result))
    if result.failure is not None:
        raise result.failure


@run_app.command("execute-rehearsal", hidden=True)
def execute_rehearsal_command(folder: Path) -> None:
    """Rehearse in a folder that `rehearse` made; it supervises this."""
    from ropeway.cli.rehearse_output import ask_version
    from ropeway.rehearse.rehearsal import read_request
    from ropeway.rehearse.rehearse_steps import run_rehearsal

    raise typer.Exit(run_rehearsal(read_request(folder), folder, ask_version))
