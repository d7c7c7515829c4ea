"""How a materialised table looks in Dagster: counts, failures, costs, schema, lineage, checks, preview, data version.

What a check means is in graft_pipeline.rules; how a preview is drawn, in graft_pipeline.previews; where columns come
from, in graft_pipeline.lineage.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg
import pyarrow as pa

from assets.keys import asset_key
from graft_pipeline import lineage, previews, rules
from graft_pipeline.errors import DataError, InputError, SettingsError
from graft_pipeline.imagery import Sensor, Source
from graft_pipeline.partitions import REGION_PARTITIONS
from graft_pipeline.previews import to_markdown
from graft_pipeline.provenance import fingerprint
from graft_pipeline.rules import Finding
from graft_pipeline.schemas import Dataset

OWNERS = ["team:data-engineering"]

#: A service that falters is tried again by the client; a step that fails all the same, twice more and later.
RETRY = dg.RetryPolicy(max_retries=2, delay=30, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)


def only_transient_retries(
    function: Callable[..., Any], policy: dg.RetryPolicy | None = None
) -> Callable[..., Any]:
    """Try again what may pass, but not wrong keys, settings, input or data; and nothing that somebody terminates.

    With a policy as `retry_policy` of the asset, Dagster tries a step again also when its run is terminated: the run
    would go on.

    Args:
        function: of an asset.
        policy: how often and when; None: never.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (SettingsError, InputError, DataError) as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        except Exception as error:
            if policy is None:
                raise
            attempt = dg.AssetExecutionContext.get().retry_number + 1
            raise dg.RetryRequested(policy.max_retries, policy.calculate_delay(attempt)) from error

    return wrapped


#: For assets that ask services or write much.
retried = functools.partial(only_transient_retries, policy=RETRY)


#: What the resources of a run count, by their names: the attribute, and its name in metadata.
COUNTERS = {
    "flickr": {"calls": "flickr_calls", "downloaded_bytes": "downloaded_bytes"},
    "images": {"requests": "image_requests", "downloaded_bytes": "downloaded_bytes"},
    "imagery": {"requests": "imagery_requests", "downloaded_bytes": "downloaded_bytes"},
}
#: What stands below sheets of the most and least typical photos or chips.
TYPICAL = (
    "Nearest to the region's mean embedding; in red frames the farthest: odd photos and bad pixels show here."
)
SCHEMA, LINEAGE = "dagster/column_schema", "dagster/column_lineage"


def measured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add to an asset's metadata what it cost (seconds, calls, bytes), and the lineage of its columns.

    Dagster takes lineage from materialisations alone, so each repeats what the definition says.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> dg.MaterializeResult:
        started, before = time.monotonic(), _counted(kwargs)
        result = function(*args, **kwargs)
        costs = {name: count - before[name] for name, count in _counted(kwargs).items()}
        context = dg.AssetExecutionContext.get()
        defined = context.assets_def.specs_by_key[context.asset_key].metadata
        metadata = {
            **(result.metadata or {}),
            **costs,
            "seconds": round(time.monotonic() - started, 2),
            **{key: value for key, value in defined.items() if key == LINEAGE},
        }
        return result._replace(metadata=metadata)

    return wrapped


def _counted(resources: Mapping[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for resource in COUNTERS.keys() & resources.keys():
        for attribute, name in COUNTERS[resource].items():
            counts[name] = counts.get(name, 0) + getattr(resources[resource], attribute)
    return dict(sorted(counts.items()))


def table_metadata(
    dataset: Dataset, sensor: Sensor | None = None, source: Source = "earth_engine"
) -> dict[str, Any]:
    """Metadata that every table's definition has: its columns, and where they come from.

    Args:
        dataset: the dataset.
        sensor: whose, where it has sensors.
        source: where imagery comes from.
    """
    return {SCHEMA: table_schema(dataset), LINEAGE: column_lineage(dataset.name, sensor, source)}


def column_lineage(
    name: str, sensor: Sensor | None = None, source: Source = "earth_engine"
) -> dg.TableColumnLineage:
    """Dagster's form of graft_pipeline.lineage; arguments as of `asset_key`."""
    return dg.TableColumnLineage(
        {
            column: [
                dg.TableColumnDep(asset_key(of, sensor, source), field)
                for of, field in (origin.split(".") for origin in origins)
            ]
            for column, origins in lineage.upstream(name).items()
        }
    )


def shown(pictures: Mapping[str, bytes], captions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Pictures as metadata, small enough together for an event log.

    Args:
        pictures: PNG or JPEG by name of the entry.
        captions: what stands below those that need it.
    """
    return {
        name: dg.MetadataValue.md(
            f"{to_markdown(picture, name.replace('_', ' '))}\n\n{(captions or {}).get(name, '')}".rstrip()
        )
        for name, picture in previews.fit(pictures).items()
    }


def fields_schema(fields: Mapping[str, str]) -> dg.TableSchema:
    """Description of what a source or a model offers, as columns."""
    return dg.TableSchema(
        columns=[dg.TableColumn(name, description=description) for name, description in fields.items()]
    )


def table_schema(dataset: Dataset) -> dg.TableSchema:
    """Dagster's description of a dataset's columns, each with its origin: only Dagster+ draws `LINEAGE`."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                field.name,
                type=str(field.type),
                description=f"{(field.metadata or {}).get(b'description', b'').decode()} "
                f"({lineage.in_words(dataset.name, field.name)})",
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
    """Specs of an asset's checks, the schema's first; all but rules.WARNINGS block what is downstream."""
    return [
        dg.AssetCheckSpec(
            name,
            asset=dg.AssetKey(list(key)),
            blocking=name not in rules.WARNINGS,
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
        severity=dg.AssetCheckSeverity.WARN
        if finding.rule in rules.WARNINGS
        else dg.AssetCheckSeverity.ERROR,
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
    pictures: Mapping[str, bytes] | None = None,
    caption: str = "",
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
        pictures: more of them, by name. Rows that are not ok are drawn by reason, if there are any.
        caption: what stands below the preview.
        version: fingerprint of the content where it is known already; None: of the table.
        **extra: more metadata.

    Returns:
        Metadata, check results and a data version that depends on content alone.
    """
    counts = rules.status_counts(table)
    drawn = ({} if picture is None else {"preview": picture}) | dict(pictures or {})
    if reasons := {name.partition("/")[2]: n for name, n in counts.items() if name.startswith("reason/")}:
        drawn["reasons"] = previews.counts(reasons, title=f"{dataset.name}: why rows are not ok")
    metadata: dict[str, Any] = {
        "dagster/row_count": table.num_rows,
        "is_changed": changed,
        **shown(drawn, {"preview": caption}),
        **counts,
        **extra,
    }
    return dg.MaterializeResult(
        metadata=metadata,
        check_results=[check_result(finding) for finding in (rules.schema(dataset, table), *findings)],
        data_version=dg.DataVersion(version or fingerprint(table)),
    )
