"""The door of the installed command `sgmd`: takes the signals before the command line loads."""

from pipelines.commands.stops import take_stops


def start() -> None:
    """Runs the command line."""
    take_stops()
    from pipelines.cli import main

    main()
