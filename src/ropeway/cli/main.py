"""`ropeway …`: every command imports what it needs itself, so that `--help` answers at once."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ropeway.cli.completion import complete_profile, complete_split_words, complete_stage, complete_version
from ropeway.cli.options import JsonOption, ProfileOption, RegistryOption, VersionArgument, open_profile
from ropeway.cli.params_commands import params_app
from ropeway.cli.record_commands import record_app
from ropeway.cli.registry_commands import registry_app
from ropeway.cli.run_commands import run_app
from ropeway.cli.version_commands import version_app
from ropeway.runtime.environment import check_renamed
from ropeway.runtime.errors import ConfigError, RopewayError, TemporaryError, disk_error
from ropeway.runtime.workspace import Workspace, find_root

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, evaluate, publish and review a long-context chat model, as params.yaml describes it.",
)
app.add_typer(run_app)
app.add_typer(version_app)
app.add_typer(record_app)
app.add_typer(registry_app, name="registry")
app.add_typer(params_app, name="params")


@app.command()
def init(  # noqa: PLR0913 - a command's options
    name: Annotated[str, typer.Argument(help="Name of the new profile, and of the model in the registry.")],
    *,
    data: Annotated[
        list[str],
        typer.Option(prompt="Data (file, folder or pattern)", help="File, folder, archive or pattern; several."),
    ],
    base: Annotated[
        str,
        typer.Option(
            prompt="Base (folder, owner/name, profile or scratch)",
            help="A model's folder, owner/name on the Hub, a profile whose base is taken, or `scratch`.",
        ),
    ],
    context: Annotated[
        int | None, typer.Option(min=64, max=1 << 24, help="Length of a row in tokens. Default: what the data needs.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of the run. Default: those of this machine.")] = None,
    gpu_memory_gib: Annotated[
        float | None, typer.Option(min=0.1, max=10_000, help="Memory of one GPU in GiB. Default: this machine's.")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters instead of all weights.")] = False,
    license_id: Annotated[
        str | None, typer.Option("--license", help="SPDX identifier for the card. Default: that of the base's README.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at data, base and machine, and add a profile to params.yaml in which every derived value says why."""
    from ropeway.onboarding.profile_name import check_profile_name

    check_profile_name(find_root() / "params.yaml", name)  # before the imports, which take seconds
    from ropeway.cli.init_output import init as run_init
    from ropeway.onboarding.derive import Machine
    from ropeway.onboarding.start import InitRequest
    from ropeway.runtime.devices import CPU_RANKS, detect_gpus

    here = detect_gpus() if gpus is None or gpu_memory_gib is None else []
    count = len(here) if gpus is None else gpus
    memory = gpu_memory_gib or (min(gpu.memory_bytes for gpu in here) / 2**30 if here else None)
    if (count > 0) != (memory is not None):
        raise ConfigError("--gpus and --gpu-memory-gib belong together on a machine without GPUs; state both or none")
    machine = Machine(count, count or CPU_RANKS, memory if count else None)
    request = InitRequest(name, base, data, machine, context, lora, license_id)
    run_init(find_root(), request, as_json=as_json)


@app.command()
def inspect(
    source: Annotated[str | None, typer.Argument(help="A source of the profile. Default: list the sources.")] = None,
    number: Annotated[
        int, typer.Argument(help="Index of a sequence in the source: a conversation or a chunk of a document.")
    ] = 0,
    *,
    profile: ProfileOption = None,
    row: Annotated[
        int | None, typer.Option(help="Show this row of an epoch instead, as training reads it. Without SOURCE.")
    ] = None,
    epoch: Annotated[int | None, typer.Option(help="Epoch of --row. Default: 0.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show one prepared sequence or training row token by token, with which tokens are supervised."""
    from ropeway.cli.inspect_output import InspectRequest
    from ropeway.cli.inspect_output import inspect as show

    show(*open_profile(profile), InspectRequest(source, number, row, epoch), as_json=as_json)


@app.command()
def chat(  # noqa: PLR0913 - a command's options
    model: Annotated[
        str,
        typer.Argument(
            help="A model's folder, or a version: NAME@ALIAS, NAME@v3 (pulled into ROPEWAY_CACHE).",
            autocompletion=complete_version,
        ),
    ],
    *,
    system: Annotated[str, typer.Option(help="System message. Default: none.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Nucleus sampling: keep the most likely tokens up to this probability."),
    ] = 0.9,
    seed: Annotated[
        int, typer.Option(help="Seed of the sampling; the same seed and questions give the same answers.")
    ] = 0,
    tools: Annotated[
        Path | None,
        typer.Option(help="JSON file: functions that the model may call, with JSON schemas. Default: none."),
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Chat with a model. From a pipe: one question per line. With --tools `/tool NAME RESULT` answers a tool call."""
    from ropeway.cli.chat import ChatSession, GenerationSettings, load_tools, locate_model
    from ropeway.cli.chat import chat as run_chat

    generation = GenerationSettings(system, max_new_tokens, temperature, top_p, seed)
    offered = load_tools(tools) if tools else ()
    session = ChatSession(locate_model(model, registry), generation, offered)
    run_chat(session, sys.stdin, sys.stdout, as_json=as_json)


@app.command("push-hub")
def push_hub(
    version: VersionArgument,
    repo: Annotated[
        str, typer.Argument(help="owner/name on the Hugging Face Hub. Needs an HF_TOKEN with write access.")
    ],
    *,
    dry_run: Annotated[bool, typer.Option(help="Verify and list the files, without contacting the Hub.")] = False,
    private: Annotated[bool, typer.Option(help="Create a new repository as private.")] = True,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify a published version and upload it to the Hugging Face Hub."""
    from ropeway.cli.registry_commands import upload_version
    from ropeway.cli.registry_options import open_registry, print_json, print_words
    from ropeway.runtime.terminal import format_count

    done = upload_version(open_registry(registry).version(version), repo, private=private, dry_run=dry_run)
    if as_json:
        print_json(asdict(done))
        return
    for path, size in done.files.items():
        typer.echo(f"{size:>16,}  {path}")
    if done.forgotten:
        print_words(
            f"{format_count(done.forgotten, 'digest')} of `forget` are zeros on the Hub, so the text files that have "
            "them differ from the registry's, and signatures of the version do not verify there"
        )
    total = f"{len(done.files)} files, {sum(done.files.values()):,} bytes of {done.version} ({done.digest[:12]}…)"
    where = f"are https://huggingface.co/{repo}/tree/{done.commit}" if done.commit else f"would go to {repo}"
    print_words(f"{total} {where}")


@app.command()
def evaluate(
    *,
    limit: Annotated[int, typer.Option(min=1, help="Validation rows per source.")] = 8,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score base and tuned on a few validation rows and write nothing; the stage evaluate scores all rows."""
    from ropeway.config.load_params import load_profile
    from ropeway.config.stages import READS
    from ropeway.runtime.terminal import AlignedTable, format_count, format_number, show
    from ropeway.stages.evaluate.stage import score_first_rows

    root = find_root()
    name, chosen = load_profile(root / "params.yaml", profile)
    rows = score_first_rows(Workspace(root, name), chosen.reading(READS["evaluate"]), limit=limit)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    heads = {"loss": "loss, nats/token", "nats_per_byte": "nats/byte"}
    show(
        AlignedTable(
            tuple(heads.get(key, key) for key in rows[0]),
            [[format_number(row.get(key, "")) for key in rows[0]] for row in rows],
            title=f"the first {format_count(limit, 'validation row')} of each source",
        )
    )


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="Name of a stage in dvc.yaml.", autocompletion=complete_stage)],
    profile: Annotated[
        str | None,
        typer.Argument(help="Profile. Default: that of the last `identity` stage.", autocompletion=complete_profile),
    ] = None,
) -> None:
    """Run one stage; dvc.yaml calls this."""
    from ropeway.orchestration.stage_process import run_stage

    raise typer.Exit(run_stage(find_root(), name, profile))


@app.command("execute-stage", hidden=True)
def execute_stage_command(name: str) -> None:
    """Run one stage in this process; `stage` supervises it."""
    from ropeway.orchestration.stage_process import execute_stage

    execute_stage(find_root(), name)


@app.command()
def review(  # noqa: PLR0913 - a command's options
    version: Annotated[
        str,
        typer.Argument(help="NAME@v3, NAME@ALIAS, or a digest (8 digits or more).", autocompletion=complete_version),
    ],
    *,
    approve: Annotated[bool, typer.Option("--approve", help="Approve: move `production` to this version.")] = False,
    reject: Annotated[bool, typer.Option("--reject", help="Reject: `production` does not move.")] = False,
    reviewer: Annotated[
        str | None, typer.Option(help="Your name; required with --approve and --reject. Recorded permanently.")
    ] = None,
    comment: Annotated[
        str | None, typer.Option(help="The reason; required with --approve and --reject. Recorded permanently.")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(help="Refuse unless `production` is this now: v3, a digest or `none`. Default: no check."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a version's review: scores, samples, changes, lineage. With --approve or --reject: record the decision."""
    from ropeway.orchestration.decision import read_answer, review_here

    answer = read_answer(approve=approve, reject=reject, reviewer=reviewer, comment=comment)
    review_here(find_root(), version, answer=answer, expect=expect, as_json=as_json)


@app.command()
def reproduce(
    version: VersionArgument,
    *,
    to: Annotated[Path | None, typer.Option(help="Folder to clone into. Default: .work/reproduce/NAME-DIGEST.")] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rerun a version from its recorded commit, params and data, and compare the weights byte by byte."""
    from ropeway.cli.registry_options import open_registry, print_json, print_words
    from ropeway.orchestration.reproduce import reproduce as make_again
    from ropeway.runtime.terminal import escape_controls

    def say(line: str) -> None:
        typer.echo(escape_controls(line), err=as_json)

    done = make_again(find_root(), open_registry(registry).version(version), target=to, write_line=say)
    if as_json:
        print_json(asdict(done))
    else:
        same = "the weights are the same, byte by byte"
        print_words(
            f"{done.version}: {same if done.weights == 'same' else 'THE WEIGHTS DIFFER'} ({done.seconds:.0f} s)"
        )
        for line in done.differences or ("nothing that is recorded differs",):
            print_words(f"  {line}")
        print_words(f"the reproduced run: {done.folder}")
    raise typer.Exit(0 if done.weights == "same" else 1)


@app.command()
def server(
    *,
    port: Annotated[int, typer.Option(help="Port of the UI and API.")] = 4200,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Other than loopback requires PREFECT_SERVER_API_AUTH_STRING=user:password."
        ),
    ] = "127.0.0.1",
) -> None:
    """Start the Prefect server and UI for this workspace; alerts are posted to ROPEWAY_ALERT_URL."""
    from ropeway.orchestration.prefect_server import serve_ui

    serve_ui(find_root(), port=port, host=host)


@app.command()
def doctor(
    *,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
    fix: Annotated[bool, typer.Option("--fix", help="Create the DVC remote and turn on its verification.")] = False,
    remote: Annotated[str | None, typer.Option(help="With --fix: URL or folder of the DVC remote to create.")] = None,
) -> None:
    """Check everything a run needs and print how to fix what is wrong. Exit code 64 if anything is wrong."""
    from ropeway.orchestration.doctor import fix_remote, print_findings, run_checks

    root = find_root()
    for words in fix_remote(root, remote) if fix else ():
        typer.echo(words, err=True)
    findings = run_checks(root, profile)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print_findings(findings)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(ConfigError.exit_code)


@app.command()
def clean(
    *,
    remove: Annotated[bool, typer.Option("--apply", help="Remove the files. Default: only list them.")] = False,
    keep: Annotated[int, typer.Option(min=1, help="Results to keep in DVC's cache per stage and profile.")] = 1,
    unsynced: Annotated[bool, typer.Option("--unsynced", help="Also remove W&B runs that were not synced.")] = False,
    no_registry: Annotated[
        bool, typer.Option("--no-registry", help="State that nothing was ever published, if there is no registry.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show disk usage, and what no current result and no published version needs; --apply removes it."""
    from ropeway.orchestration import cleanup as cleaning

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
    cleaning.print_cleanup(places, removals, removed=remove)


@app.command()
def serve(
    *,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="Profile that is scheduled and watched; several. Default: the `profile:` line of params.yaml.",
            autocompletion=complete_profile,
        ),
    ] = None,
    cron: Annotated[
        list[str] | None,
        typer.Option(
            help="Schedule in UTC for runs, e.g. '0 3 * * *'; of one profile: 'NAME=0 3 * * *'. Default: no schedule."
        ),
    ] = None,
    watch: Annotated[
        str | None,
        typer.Option(
            help="Look at the sources this often, e.g. 10m, and start a run if one changed; `notified`: only after "
            "`ropeway notify-data`. Default: no."
        ),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Every run runs the pipeline on a few records first.")
    ] = False,
) -> None:
    """Serve the flows, to start them from the Prefect UI or on a schedule; needs a running `ropeway server`."""
    from ropeway.orchestration.deployments import serve_flows

    serve_flows(find_root(), crons=cron or (), profiles=profile or (), watch=watch, rehearse=rehearse)


@app.command("notify-data")
def notify_data_command(
    *,
    source: Annotated[str, typer.Option(help="The source that changed, for the event. Default: not stated.")] = "",
    note: Annotated[str, typer.Option(help="Text for the event, e.g. the name of a job.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Tell `ropeway serve --watch` to look at the sources now; returns once the Prefect server has stored it."""
    from ropeway.orchestration.prefect_server import persistent_server_url
    from ropeway.orchestration.source_watcher import EVENT, notify_data

    url = persistent_server_url(find_root())
    if not url:
        raise TemporaryError(
            "no Prefect server runs for this workspace; start `ropeway server`, or set PREFECT_API_URL"
        )
    event = notify_data(url, source, note)
    if as_json:
        typer.echo(json.dumps({"event": EVENT, "id": event}))
    else:
        typer.echo(f"{EVENT} is stored on {url}; `ropeway serve --watch` looks at the sources within 10 s")


def main() -> None:
    """Run a command; our own errors print without a traceback and end with their code."""
    try:
        if complete_split_words(os.environ, app):
            return
        check_renamed(os.environ)
        app()
    except RopewayError as error:
        _end(error)
    except OSError as error:
        if (told := disk_error(error)) is None:
            raise
        _end(told)


def _end(error: RopewayError) -> NoReturn:
    """Print an error and end with its code."""
    from ropeway.runtime.terminal import escape_controls  # rich takes 0.05 s; most commands end without an error

    # Names of files, keys of records and texts of the registry are in messages.
    print(f"ropeway: {escape_controls(error)}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
