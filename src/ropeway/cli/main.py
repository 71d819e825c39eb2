"""`ropeway …`: every command imports what it needs itself, so that `--help` answers at once."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ropeway.cli.registry_commands import registry_app
from ropeway.runtime.errors import ConfigError, RopewayError
from ropeway.runtime.workspace import Workspace, find_root

if TYPE_CHECKING:
    from ropeway.config.params import Profile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Retrain a long-context chat Llama: fetch, base, tokenize, prepare, train, evaluate, package, publish.",
)
app.add_typer(registry_app, name="registry")

ProfileOption = Annotated[str | None, typer.Option(help="Which run of params.yaml; default: the one it names.")]
RegistryOption = Annotated[str | None, typer.Option(help="Default: ROPEWAY_REGISTRY, else ./registry")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


def _choose(profile: str | None) -> "tuple[Workspace, Profile]":
    """Return the workspace here, and the run of params.yaml that is meant."""
    from ropeway.config.load_params import load_profile

    name, chosen = load_profile(find_root() / "params.yaml", profile)
    return Workspace(find_root(), name), chosen


@app.command()
def run(
    *,
    profile: ProfileOption = None,
    prefect: Annotated[bool, typer.Option(help="Run under Prefect, so that the run can be looked at.")] = True,
    resume_from: Annotated[
        str | None,
        typer.Option(help="FINGERPRINT[@STEP] of .checkpoints: go on from another run; written into params.yaml."),
    ] = None,
) -> None:
    """Make the run that params.yaml describes, and publish the model as `candidate`."""
    from ropeway.config import edit as edits
    from ropeway.orchestration.sequence import ExitDeadline, run_retrain

    if resume_from is not None:
        edits.resume_from(find_root(), profile, resume_from)
    run_retrain(find_root(), profile, use_prefect=prefect, ending=ExitDeadline(exits=True))


@app.command()
def plan(
    *,
    profile: ProfileOption = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Default: the GPUs of this machine, else 2.")] = None,
    gpu_memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of one GPU. Default: this machine's, else 40 and 80.")
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="For hours: a100, h100, h200, l40s, v100, or a peak in TFLOPS.")
    ] = None,
    mfu: Annotated[float | None, typer.Option(help="For hours: model FLOPS utilisation, 0 to 1.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run will do before anything is spent: rows, steps, memory, disk, hours, and whether it fits."""
    from ropeway.planning.plan import PlanRequest, plan_run
    from ropeway.planning.plan_text import describe_plan
    from ropeway.runtime.devices import count_ranks

    asked = PlanRequest(gpu_memory_gib, card, mfu)
    planned = plan_run(*_choose(profile), ranks=ranks or count_ranks(), asked=asked)
    typer.echo(planned.as_json() if as_json else describe_plan(planned))


@app.command()
def inspect(
    source: Annotated[str | None, typer.Argument(help="A source of the profile; default: list them.")] = None,
    number: Annotated[int, typer.Argument(help="A sequence of it: a conversation, or a chunk of a document.")] = 0,
    *,
    profile: ProfileOption = None,
    row: Annotated[int | None, typer.Option(help="Show this row of an epoch instead, as training reads it.")] = None,
    epoch: Annotated[int | None, typer.Option(help="Of --row; default: 0.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show one prepared sequence, or one row, token by token: what is learned of it and what is only read."""
    from ropeway.cli.inspect_output import InspectRequest
    from ropeway.cli.inspect_output import inspect as show

    show(*_choose(profile), InspectRequest(source, number, row, epoch), as_json=as_json)


@app.command()
def chat(  # noqa: PLR0913 - a command's options
    model: Annotated[str, typer.Argument(help="A model's folder, or NAME@ALIAS (pulled into ROPEWAY_CACHE).")],
    *,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token every time.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Draw from the likeliest with this share.")] = 0.9,
    seed: Annotated[int, typer.Option(help="The same seed and turns give the same answers.")] = 0,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model. From a pipe: one question a line, one answer after another."""
    from ropeway.cli.chat import ChatSession, GenerationSettings, locate_model
    from ropeway.cli.chat import chat as run_chat

    generation = GenerationSettings(system, max_new_tokens, temperature, top_p, seed)
    run_chat(ChatSession(locate_model(model, registry), generation), sys.stdin, sys.stdout, as_json=as_json)


@app.command("push-hub")
def push_hub(
    version: Annotated[str, typer.Argument(help="NAME@v3, NAME@ALIAS or NAME@DIGEST of the registry.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub; HF_TOKEN must let you write.")],
    *,
    dry_run: Annotated[bool, typer.Option(help="Verify and list; ask the Hub nothing.")] = False,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = True,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a published version, every byte verified, to the Hugging Face Hub."""
    from ropeway.cli.registry_commands import open_registry, print_json, upload_version

    done = upload_version(open_registry(registry).version(version), repo, private=private, dry_run=dry_run)
    if as_json:
        print_json(asdict(done))
        return
    for path, size in done.files.items():
        typer.echo(f"{size:>16,}  {path}")
    total = f"{len(done.files)} files, {sum(done.files.values()):,} bytes of {done.version} ({done.digest[:12]}…)"
    where = f"are https://huggingface.co/{repo}/tree/{done.commit}" if done.commit else f"would go to {repo}"
    typer.echo(f"{total} {where}")


@app.command()
def evaluate(
    *,
    limit: Annotated[int, typer.Option(min=1, help="Validation rows of each source.")] = 8,
    profile: ProfileOption = None,
) -> None:
    """Look quickly at base and tuned over a few validation rows; the stage of that name measures all and writes."""
    from ropeway.config.load_params import load_profile
    from ropeway.config.stages import READS
    from ropeway.stages.evaluate.stage import look

    root = find_root()
    name, chosen = load_profile(root / "params.yaml", profile)
    typer.echo(look(Workspace(root, name), chosen.reading(READS["evaluate"]), limit=limit))


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="A stage of dvc.yaml.")],
    profile: Annotated[str | None, typer.Argument(help="Whose; default: the one of the last `identity`.")] = None,
) -> None:
    """Run one stage: what dvc.yaml calls."""
    from ropeway.orchestration.stage_process import run_stage

    raise typer.Exit(run_stage(find_root(), name, profile))


@app.command("execute-stage", hidden=True)
def execute_stage_command(name: str) -> None:
    """Run one stage in this process: what `stage` supervises."""
    from ropeway.orchestration.stage_process import execute_stage

    execute_stage(find_root(), name)


@app.command()
def review(  # noqa: PLR0913 - a command's options
    version: Annotated[str, typer.Argument(help="Its digest (8 digits or more) or NAME@v3.")],
    *,
    approve: Annotated[bool, typer.Option("--approve", help="Make it production.")] = False,
    reject: Annotated[bool, typer.Option("--reject", help="Leave production where it is.")] = False,
    reviewer: Annotated[str | None, typer.Option(help="Who decides; kept for ever.")] = None,
    comment: Annotated[str | None, typer.Option(help="Why, in words; kept for ever.")] = None,
    expect: Annotated[str | None, typer.Option(help="What production must be: v3, a digest or `none`.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what speaks for and against making a version `production`, or decide it."""
    from ropeway.orchestration.decision import read_answer, review_here

    answer = read_answer(approve=approve, reject=reject, reviewer=reviewer, comment=comment)
    review_here(find_root(), version, answer=answer, expect=expect, as_json=as_json)


@app.command()
def reproduce(
    version: Annotated[str, typer.Argument(help="NAME@v3, NAME@ALIAS or NAME@DIGEST of the registry.")],
    *,
    to: Annotated[Path | None, typer.Option(help="Folder to clone into; default: .work/reproduce/NAME-DIGEST.")] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version again from its recorded revision, params and data, and compare the weights byte by byte."""
    from ropeway.cli.registry_commands import open_registry, print_json
    from ropeway.orchestration.reproduce import reproduce as make_again

    def say(line: str) -> None:
        typer.echo(line, err=as_json)

    done = make_again(find_root(), open_registry(registry).version(version), target=to, write_line=say)
    if as_json:
        print_json(asdict(done))
    else:
        same = "the weights are the same, byte by byte"
        typer.echo(f"{done.version}: {same if done.weights == 'same' else 'THE WEIGHTS DIFFER'} ({done.seconds:.0f} s)")
        for line in done.differences or ("nothing that is recorded differs",):
            typer.echo(f"  {line}")
        typer.echo(f"the run made again: {done.folder}")
    raise typer.Exit(0 if done.weights == "same" else 1)


@app.command()
def server(
    *,
    port: Annotated[int, typer.Option(help="Where the UI answers.")] = 4200,
    host: Annotated[
        str, typer.Option(help="Another than loopback only with PREFECT_SERVER_API_AUTH_STRING=user:password set.")
    ] = "127.0.0.1",
) -> None:
    """Start the Prefect server and UI over this workspace's runs; ROPEWAY_ALERT_URL hears of runs that end badly."""
    from ropeway.orchestration.prefect_server import serve_ui

    serve_ui(find_root(), port=port, host=host)


@app.command()
def doctor(
    *,
    as_json: JsonOption = False,
    fix: Annotated[bool, typer.Option("--fix", help="Create the DVC remote, let it verify what it gives.")] = False,
    remote: Annotated[str | None, typer.Option(help="With --fix: where the DVC remote shall be.")] = None,
) -> None:
    """Look at everything a run needs and say how to fix what is wrong; ends with 64 if something is."""
    from ropeway.orchestration.doctor import draw, fix_remote, run_checks

    root = find_root()
    for words in fix_remote(root, remote) if fix else ():
        typer.echo(words, err=True)
    findings = run_checks(root)
    typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1) if as_json else draw(findings))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(ConfigError.exit_code)


@app.command()
def clean(
    *,
    remove: Annotated[bool, typer.Option("--apply", help="Remove it; without this the plan is only shown.")] = False,
    keep: Annotated[int, typer.Option(min=1, help="Results of each stage and profile that stay in DVC's cache.")] = 1,
    unsynced: Annotated[bool, typer.Option("--unsynced", help="Also W&B runs that were not sent to W&B.")] = False,
    no_registry: Annotated[bool, typer.Option("--no-registry", help="Nothing was ever published.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what takes disk and what nothing needs any more: no present result, no version of the registry."""
    from ropeway.orchestration import cleanup as cleaning
    from ropeway.planning.budget import gib

    root = find_root()
    places = cleaning.measure(root)
    if remove:
        removals = cleaning.clean(root, keep=keep, unsynced=unsynced, without_registry=no_registry)
    else:
        removals = cleaning.plan_clean(root, keep=keep, unsynced=unsynced)
    if as_json:
        values = [asdict(one) | {"path": str(one.path)} for one in removals]
        sizes = [asdict(one) | {"path": str(one.path)} for one in places]
        typer.echo(json.dumps({"places": sizes, "removals": values, "removed": remove}, indent=1))
        return
    for place in places:
        typer.echo(f"{place.name:<16}{gib(place.bytes):>12}  {place.rule}")
    typer.echo(cleaning.draw(removals, removed=remove))


@app.command()
def serve(
    *,
    cron: Annotated[
        str | None, typer.Option(help="Retrain at these times, in UTC: '0 3 * * *'; default: never.")
    ] = None,
) -> None:
    """Make the flows startable from Prefect's pages and by the clock; needs a running `ropeway server`."""
    from ropeway.orchestration.deployments import serve_flows

    serve_flows(find_root(), cron=cron)


def main() -> None:
    """Run a command; our own errors print without a traceback and end with their code."""
    try:
        app()
    except RopewayError as error:
        print(f"ropeway: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
