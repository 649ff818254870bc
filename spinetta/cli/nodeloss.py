"""``spinetta node confirm-dead``: an administrator's word that a node is lost for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from spinetta.cli import output
from spinetta.cli.base import client_options, json_option, with_client
from spinetta.cli.who import confirm

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import ConfirmedDead


@click.command("confirm-dead")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@client_options
def confirm_dead(
    name: str, yes: bool, as_json: bool, node: str | None, timeout: str | None, config_file: str | None
) -> None:
    """Vouch that nothing runs any more on a lost node, because it burned, was switched off or sent away.

    Its tasks go back to the queue at once, without the wait until they have certainly been killed there, also while
    more than half of the nodes look dead. A voter's seat goes to another node, if one can take it. If it is not true
    and the node still runs tasks, two attempts of one may run at the same time; still one result is recorded. A node
    that is alive is refused.

    \b
    Examples:
      spinetta node confirm-dead n2
      spinetta node confirm-dead n2 --yes --json
    """

    async def work(client: AsyncClient) -> ConfirmedDead:
        return await client.confirm_dead(name)

    confirm(f"Is it certain that nothing runs on {name} any more?", yes=yes, as_json=as_json)
    found = with_client(work, node, timeout, config_file)
    if as_json:
        output.put_json(
            {"node": name, "incarnation": found.incarnation, "running": found.running, "was_dead": found.was_dead}
        )
        return
    tasks = f"{found.running} task{'' if found.running == 1 else 's'}"
    held = f"{tasks} of it: put back, or lost if not to be started again" if found.running else "it holds nothing"
    output.say(f"{name} was known to be dead already; {held}" if found.was_dead else f"{name} is dead; {held}")
