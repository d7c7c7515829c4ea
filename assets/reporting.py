"""How a materialised table looks in Dagster: row counts, failures by reason, schema, checks, preview, data version.

What a check means is in graft_pipeline.rules; how a preview is drawn, in graft_pipeline.previews.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import dagster as dg
import pyarrow as pa

from graft_pipeline import rules
from graft_pipeline.errors import DataError, InputError, SettingsError
from graft_pipeline.partitions import REGION_PARTITIONS
from graft_pipeline.previews import to_markdown
from graft_pipeline.provenance import fingerprint
from graft_pipeline.rules import Finding
from graft_pipeline.schemas import Dataset

OWNERS = ["team:data-engineering"]

#: A service that falters is tried again by the client; a step that fails all the same, twice more and later.
RETRY = dg.RetryPolicy(max_retries=2, delay=30, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)


def only_transient_retries(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a retry policy try again what may pass, but not wrong keys, settings, input or data."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (SettingsError, InputError, DataError) as error:
            raise dg.Failure(str(error), allow_retries=False) from error

    return wrapped


def table_schema(dataset: Dataset) -> dg.TableSchema:
    """Dagster's description of a dataset's columns."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                field.name,
                type=str(field.type),
                description=(field.metadata or {}).get(b"description", b"").decode(),
                constraints=dg.TableColumnConstraints(
                    nullable=field.nullable, unique=dataset.key == (field.name,)
                ),
            )
            for field in dataset.schema
        ]
    )


def check_specs(
    key: Sequence[str], *rules_of_data: str, partitioned: bool = True, schema: bool = True
) -> list[dg.AssetCheckSpec]:
    """Specs of an asset's checks, the schema's first; all block what is downstream."""
    return [
        dg.AssetCheckSpec(
            name,
            asset=dg.AssetKey(list(key)),
            blocking=True,
            description=rules.DESCRIPTIONS[name],
            partitions_def=REGION_PARTITIONS if partitioned else None,
        )
        for name in (*(["schema"] if schema else []), *rules_of_data)
    ]


def check_result(finding: Finding) -> dg.AssetCheckResult:
    """A finding as Dagster shows it, with its evidence also when it passed."""
    return dg.AssetCheckResult(
        passed=finding.passed,
        check_name=finding.rule,
        severity=dg.AssetCheckSeverity.ERROR,
        description=finding.message,
        metadata={"violations": finding.violations, **finding.evidence},
    )


def report_table(
    dataset: Dataset,
    table: pa.Table,
    *,
    changed: bool,
    findings: Sequence[Finding] = (),
    picture: bytes | None = None,
    version: str | None = None,
    **extra: Any,
) -> dg.MaterializeResult:
    """The result of an asset that wrote one partition of a dataset.

    Args:
        dataset: the dataset written.
        table: the rows as they lie on disk now.
        changed: whether any byte changed.
        findings: domain rules that were checked; the schema is always checked.
        picture: PNG or JPEG preview.
        version: fingerprint of the content where it is known already; None: of the table.
        **extra: more metadata.

    Returns:
        Metadata, check results and a data version that depends on content alone.
    """
    metadata: dict[str, Any] = {
        "dagster/row_count": table.num_rows,
        "is_changed": changed,
        **rules.status_counts(table),
        **extra,
    }
    if picture is not None:
        metadata["preview"] = dg.MetadataValue.md(to_markdown(picture, dataset.name))
    return dg.MaterializeResult(
        metadata=metadata,
        check_results=[check_result(finding) for finding in (rules.schema(dataset, table), *findings)],
        data_version=dg.DataVersion(version or fingerprint(table)),
    )
