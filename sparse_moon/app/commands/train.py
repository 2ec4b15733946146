"""``sparse-moon train``."""

from sparse_moon.app import run_folder
from sparse_moon.app.commands import settings
from sparse_moon.app.parsers import Namespace
from sparse_moon.app.start import start
from sparse_moon.app.tables import format_kernels, format_results


def run(arguments: Namespace) -> None:
    """Train one run and print its figures."""
    results, config, folder = start(
        settings(vars(arguments)), arguments.out, given=arguments.given, resume=arguments.resume,
        progress=not arguments.quiet, time_dense=arguments.time_dense, log=arguments.log or (),
    )  # fmt: skip
    if not results:  # in all but the first of several processes
        return
    print(format_results(results, config))
    if arguments.time_dense:
        print(f"\n{format_kernels(results)}")
    print(f"\nall scores, figures and curves are in the report: {folder / run_folder.REPORT}")
