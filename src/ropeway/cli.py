"""`ropeway …`: the door for people. Every command imports what it needs itself, so that `--help` answers at once."""

import sys
from typing import Annotated

import typer

from ropeway.errors import RopewayError
from ropeway.registry.commands import registry_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Retrain a long-context chat Llama on a schedule: fetch, base, prepare, train, evaluate, package, publish.",
)
app.add_typer(registry_app, name="registry")

ProfileOption = Annotated[str | None, typer.Option(help="Which run of params.yaml; default: the one it names.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command()
def run(
    *,
    profile: ProfileOption = None,
    prefect: Annotated[bool, typer.Option(help="Run under Prefect, so that the run can be looked at.")] = True,
) -> None:
    """Make the run that params.yaml describes, and publish the model as `candidate`."""
    from flows.retrain import run_retrain
    from ropeway.workspace import find_root

    run_retrain(find_root(), profile, use_prefect=prefect)


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
    """Say what a run will do before anything is spent: rows, steps, memory, disk, hours, and whether it fits."""
    from ropeway.devices import count_ranks
    from ropeway.params import load_profile
    from ropeway.plan import Asked, plan_run
    from ropeway.plan_text import describe_plan
    from ropeway.workspace import Workspace, find_root

    root = find_root()
    name, chosen = load_profile(root / "params.yaml", profile)
    planned = plan_run(
        Workspace(root, name), chosen, ranks=ranks or count_ranks(), asked=Asked(gpu_memory_gib, card, mfu)
    )
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
    from ropeway.params import load_profile
    from ropeway.terminal import Wish
    from ropeway.terminal import inspect as show
    from ropeway.workspace import Workspace, find_root

    root = find_root()
    name, chosen = load_profile(root / "params.yaml", profile)
    show(Workspace(root, name), chosen, Wish(source, number, row, epoch), as_json=as_json)


@app.command()
def stage(name: Annotated[str, typer.Argument(help="A stage of dvc.yaml.")]) -> None:
    """Run one stage of the chosen profile: what dvc.yaml calls."""
    from ropeway.stages import run_stage
    from ropeway.workspace import find_root

    raise typer.Exit(run_stage(find_root(), name))


@app.command(hidden=True)
def room(name: str) -> None:
    """Run one room in this process: what `stage` supervises."""
    from ropeway.stages import enter_room
    from ropeway.workspace import find_root

    enter_room(find_root(), name)


@app.command()
def review(
    version: Annotated[str, typer.Argument(help="Its digest (8 digits or more) or NAME@v3.")],
    *,
    approve: Annotated[bool, typer.Option("--approve", help="Make it production.")] = False,
    reject: Annotated[bool, typer.Option("--reject", help="Leave production where it is.")] = False,
    reviewer: Annotated[str | None, typer.Option(help="Who decides; kept for ever.")] = None,
    comment: Annotated[str | None, typer.Option(help="Why, in words; kept for ever.")] = None,
    expect: Annotated[str | None, typer.Option(help="What production must be: v3, a digest or `none`.")] = None,
) -> None:
    """Show what speaks for and against making a version `production`, or decide it."""
    from flows.decision import read_answer, review_here
    from ropeway.workspace import find_root

    answer = read_answer(approve=approve, reject=reject, reviewer=reviewer, comment=comment)
    review_here(find_root(), version, answer=answer, expect=expect)


@app.command()
def server(*, port: Annotated[int, typer.Option(help="Where the UI answers, on loopback.")] = 4200) -> None:
    """Start the Prefect server and UI over this workspace's runs."""
    from flows.server import serve_ui
    from ropeway.workspace import find_root

    serve_ui(find_root(), port=port)


def main() -> None:
    """Run a command; our own errors print without a traceback and end with their code."""
    try:
        app()
    except RopewayError as error:
        print(f"ropeway: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
