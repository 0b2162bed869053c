"""`drsync init`: a new repository and its key."""

import click

from drsync.cli import render
from drsync.cli.app import App, json_option, pass_app


@click.command("init")
@json_option
@pass_app
def command(app: App) -> None:
    """Create the repository and its key file.

    Prints the recovery key, this one time; it is kept nowhere in readable form.
    Write it down, away from this host. With it `drsync key recover` makes the key
    file again; without both, nobody can read the repository.
    """
    session = app.session()
    recovery = session.init()
    settings = session.config.repository
    if app.as_json:
        render.document(
            {
                "repository": settings.url,
                "repository_id": session.repository.record.id,
                "key_file": str(settings.key_file),
                "recovery_key": recovery.to_text(),
            }
        )
        return
    render.line(f"created repository {settings.url}")
    render.line(f"wrote its key to {settings.key_file}, for its owner only")
    render.line()
    render.line("Recovery key, shown only now. Write it down and keep it away from this host:")
    render.line()
    render.line(f"    {recovery.to_text()}")
