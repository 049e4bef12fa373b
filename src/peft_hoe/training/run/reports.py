"""Where metrics go besides the console: transformers' `report_to`."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.integrations import integration_utils

from ...errors import HoEError

_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml"}  # where they have another name than the report
_WITHOUT_TEST = ("flyte",)  # transformers does not look for their packages


def check_reports(names: Sequence[str]) -> None:
    """See that transformers can report to all of these, before anything is loaded.

    Raises:
        HoEError: it knows no such report, or its package is not installed.
    """
    known = list(integration_utils.INTEGRATION_TO_CALLBACK)
    installed = [*integration_utils.get_available_reporting_integrations(), *_WITHOUT_TEST]
    for name in names:
        if name not in known:
            raise HoEError(
                f"metrics cannot be reported to {name!r}; use one of {', '.join(known)}",
                argument="report_to", value=name, allowed=known,
            )  # fmt: skip
        if name not in installed:
            raise HoEError(
                f"reporting to {name!r} needs a package that is not installed: pip install {_PACKAGES.get(name, name)}",
                argument="report_to", value=name, allowed=installed,
            )  # fmt: skip
