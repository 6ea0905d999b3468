"""`ursa data versions | changes | uses`: how the data of a source came to be, and who used it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ursa.cli.data import AsJson, root_uri
from ursa.cli.lines import print_lines
from ursa.errors import ConfigError

if TYPE_CHECKING:
    from ursa.data.versions import DatasetVersion


def versions(root: str | None = None, *, as_json: AsJson = False) -> None:
    """List the versions of every data set, with what changed from one to the next.

    Example: ursa data versions .ursa/data

    Args:
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        as_json: Print JSON: the records as they are committed.
    """
    from ursa.data.versions import list_versions

    place = root_uri(root)
    found = list_versions(place)
    if as_json:
        print(json.dumps([version.model_dump(mode="json") for version in found], indent=1))
        return
    if not found:
        print_lines(f"no version at {place} yet: `make run`, or the data preparation, makes one")
        return
    from ursa.cli.data_tables import print_versions

    print_versions(found)


def changes(
    root: str | None = None,
    *,
    number: int | None = None,
    source: str | None = None,
    as_json: AsJson = False,
) -> None:
    """Name the files that a version added, renamed, edited, removed or recaptioned, and settings.

    Example: ursa data changes .ursa/data --number 2

    Args:
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        number: Of the version; the newest.
        source: Of the data set, where the root holds several.
        as_json: Print JSON.
    """
    from ursa.data.versions import Change, changed_settings, list_versions, read_changes

    found = list_versions(root_uri(root))
    version = choose_version(found, number, source)
    parent = next((item for item in found if item.manifest_uri == version.parent_uri), None)
    settings = changed_settings(version, parent) if parent else []
    files = read_changes(version)
    num_recaptioned = sum(item.change == Change.RECAPTIONED for item in files)
    if as_json:
        rows = [item._asdict() for item in files]
        print(json.dumps({"changes": rows, "settings": settings}, indent=1))
        return
    for item in files:
        before = f"  (was {item.previous_uri})" if item.previous_uri else ""
        print_lines(f"{item.change:11} {item.source_uri}{before}")
    for name in settings:
        print(f"{'setting':11} {name}")
    if parent is None and version.parent_uri is not None:
        print_lines(f"settings are not compared: {version.parent_uri} cannot be read")
    if num_recaptioned:
        print(f"captions changed: {num_recaptioned} files")
    num_other = len(files) - num_recaptioned
    num_same = version.num_unchanged + num_recaptioned
    print(f"version {version.number}: {num_other} files differ, {num_same} do not")


def uses(
    what: str, root: str | None = None, *, flag: str | None = None, as_json: AsJson = False
) -> None:
    """Name the data set versions and models that a file is in, whatever it was called.

    Models are those that saw it: a version whose selection kept no clip of it has none. Those that
    began with the weights of such a model are named too, and those that have a
    tokenizer which was fitted with the file.

    Exit status 1 if it is in none. Example: ursa data uses videos/tree_hand.mp4 .ursa/data

    Example: ursa data uses videos/tree_hand.mp4 --flag "taken down on request"

    Args:
        what: The file: a path, its URI in the source, or its sha256.
        root: The data root, a directory or s3://...; URSA_DATA_URI, or .ursa/data.
        flag: Why the registered versions of these models are to be marked (tag ursa.takedown): they
            then become champion by hand and with a reason only.
        as_json: Print JSON; with --flag, `flagged` of each row names its marked versions, and
            `aliases` there says which is champion.
    """
    if flag is not None and not flag.strip():
        raise ConfigError("--flag: say why, such as --flag 'taken down on request'")
    data_uri = root_uri(root)
    names = _listed_names(what)
    rows = _rows_of_uses(data_uri, names)
    if as_json:
        if rows and flag is not None:
            _flag_versions(rows, f"{names[0]}: {flag.strip()}")
        print(json.dumps(rows, indent=1))
    else:
        _print_uses(rows)
    if not rows:
        if not as_json:
            is_here = "://" in what or len(what) == 64 or Path(what.split("#")[0]).exists()
            print_lines(f"no version holds {names[0]}" + ("" if is_here else ", nor is it there"))
        sys.exit(1)
    if flag is not None and not as_json:
        _print_flagged(_flag_versions(rows, f"{names[0]}: {flag.strip()}"))


def _rows_of_uses(data_uri: str, names: list[str]) -> list[dict[str, Any]]:
    """Describe the versions that hold a file, then others whose tokenizers were fitted with it.

    No model has seen a file of which no clip was kept. Where that is not known, it may have.
    """
    from ursa.artifacts import ExportedModel
    from ursa.data.versions import count_kept_clips, find_fitted_uses, find_uses
    from ursa.inspection.root import MODELS, good_records, models_of

    found = find_uses(data_uri, *names)
    if not found:
        return []
    holding = {version.manifest_uri: version for version, _ in found}
    counts = {uri: count_kept_clips(version) for uri, version in holding.items()}
    uses: list[tuple[DatasetVersion, dict[str, Any], tuple[str, ...]]] = []
    for version, file in found:
        counted = counts[version.manifest_uri]
        num_kept = None if counted is None else counted[file["source_uri"]]
        uses.append((version, {**file, "num_kept": num_kept if file["num_clips"] else 0}, ()))
    holders = [version for version, file, _ in uses if file["num_kept"] != 0]
    nothing = {"source_uri": None, "content": None, "status": None, "num_clips": 0, "num_kept": 0}
    uses += [(version, nothing, kinds) for version, kinds in find_fitted_uses(data_uri, holders)]
    models = good_records(data_uri, MODELS, ExportedModel)
    rows = []
    for version, file, tokenizers in uses:
        is_used = file["num_kept"] != 0 or tokenizers
        trained, descendants = models_of(models, version.tokens_uri) if is_used else ([], [])
        rows.append(
            {
                "version": version.number,
                "source": version.source_uri,
                "manifest": version.manifest_uri,
                "file": file["source_uri"],
                "content": file["content"],
                "status": file["status"],
                "clips": file["num_clips"],
                "kept_clips": file["num_kept"],
                "tokenizers": list(tokenizers),
                "models": [model.directory_uri for model in trained],
                "descendants": [model.directory_uri for model in descendants],
            }
        )
    return rows


def _print_uses(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["tokenizers"]:
            names = ", ".join(row["tokenizers"])
            how = f"no clip of it kept, but fitted with it: tokenizers ({names})"
        else:
            num_kept = "unknown" if row["kept_clips"] is None else row["kept_clips"]
            how = f"{row['file']}: {row['status']}, {num_kept} of {row['clips']} clips kept"
        print_lines(f"version {row['version']} of {row['source']}", f"  {how}")
        for model in row["models"]:
            print_lines(f"  model {model}")
        for model in row["descendants"]:
            print_lines(f"  model {model}, whose weights began with those of a model above")


def _flag_versions(rows: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Mark the registered versions of all models of some uses; each row then names its own.

    Returns:
        All of them, each once.
    """
    from ursa.cli.backstage import call_tasks
    from ursa.cli.models import check_answers, registry_uri

    uri = registry_uri()
    check_answers(uri)
    directories = {name for row in rows for name in (*row["models"], *row["descendants"])}
    found: list[dict[str, Any]] = call_tasks(
        "flag-versions", tracking_uri=uri, directories=sorted(directories), text=text
    )
    for row in rows:
        own = (*row["models"], *row["descendants"])
        row["flagged"] = [item for item in found if item["directory"] in own]
    return found


def _print_flagged(found: list[dict[str, Any]]) -> None:
    for item in found:
        known_as = f" ({', '.join(item['aliases'])})" if item["aliases"] else ""
        print_lines(f"flagged {item['name']} version {item['version']}{known_as}")
    if not found:
        print("no version of these models is registered")


def _listed_names(what: str) -> list[str]:
    """Return how a file may be listed that a person names: its URI, or that of a tar's member."""
    from ursa.sources.names import member_uri
    from ursa.storage import absolute_uri

    if len(what) == 64 and "/" not in what and not Path(what).exists():
        return [what]  # a sha256

    def listed(name: str) -> str:
        place = absolute_uri(name)
        return place if "://" in place else Path(place).as_uri()

    names = [listed(what)]
    for index in (index for index, letter in enumerate(what) if letter == "#"):
        tar_uri, member = listed(what[:index]), what[index + 1 :]
        # as a person writes its name, and as a list of files does
        names += [member_uri(tar_uri, member), f"{tar_uri}#{member}"]
    # a manifest's addresses are listed as they stand there
    return [*names, what] if "://" in what else names


def choose_version(
    found: "list[DatasetVersion]",
    number: int | None,
    source: str | None,
    *,
    option: str = "--number",
) -> "DatasetVersion":
    """Return the version that options name.

    Args:
        found: All versions.
        number: Of the version; the newest of the source if None.
        source: Of the data set; needed where there are several.
        option: What the number was given by.

    Raises:
        ConfigError: If there is no such version.
    """
    from ursa.storage import absolute_uri

    sources = sorted({version.source_uri for version in found})
    if source is not None and source not in sources:  # written in another way
        place = absolute_uri(source)
        source = next((item for item in sources if absolute_uri(item) == place), source)
    if source is None and len(sources) > 1:
        raise ConfigError(f"name one of the sources with --source: {', '.join(sources)}")
    own = [version for version in found if source in {None, version.source_uri}]
    chosen = [version for version in own if number in {None, version.number}]
    if not own:
        if not sources:
            raise ConfigError(
                "there is no version of a data set at this data root yet; a run commits the first, "
                "URSA_DATA_URI or the argument names another root"
            )
        raise ConfigError(f"no version of {source}; there are: {', '.join(sources)}")
    if not chosen:
        numbers = ", ".join(str(version.number) for version in own)
        raise ConfigError(f"no version {number}; {option} is one of {numbers}")
    return chosen[-1]
