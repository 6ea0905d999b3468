"""Find what is committed below a data root."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from ursa import storage
from ursa.artifacts import ClipSelection, ExportedModel, TokenDatasets, TokenizerRef
from ursa.config import (
    PRESETS,
    FrozenModel,
    RunConfig,
    TokenizationConfig,
    load_config,
)
from ursa.data.units import RECIPE_NAME, TokenizationRecipe
from ursa.data.versions import list_versions
from ursa.errors import DataError, ManifestError

MANIFEST_NAME = "manifest.json"
CLIP_SETS = ("clips", "sets")
SELECTIONS = ("selections",)
TOKENS = ("tokens",)
MODELS = ("models",)
VISUAL_TOKENIZERS = ("tokenizers", "visual")

Record = TypeVar("Record", bound=FrozenModel)


def check_root(root_uri: str) -> None:
    """Refuse a place without any committed clips.

    Args:
        root_uri: The data root.

    Raises:
        DataError: If nothing is committed there.
        StorageError: If the store refuses or does not answer.
    """
    if not manifest_uris(root_uri, CLIP_SETS):
        raise DataError(
            f"{root_uri} holds no committed clips (clips/sets/*/manifest.json); give the data root "
            "of a run, such as .ursa/data or the value of URSA_DATA_URI"
        )


def manifest_uris(root_uri: str, folder: Sequence[str]) -> list[str]:
    """Return the URIs of all manifests one level below a folder, sorted.

    Args:
        root_uri: The data root.
        folder: Segments below the root, such as `SELECTIONS`.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    parent_uri = storage.join(root_uri, *folder)
    ending = f"/{MANIFEST_NAME}"
    names = {
        item.uri.split("/")[-2] for item in list_below(parent_uri) if item.uri.endswith(ending)
    }
    return [storage.join(parent_uri, name, MANIFEST_NAME) for name in sorted(names)]


def list_below(uri: str) -> list[storage.StoredFile]:
    """Return the files below a folder, without etags; none if there is no such folder.

    Args:
        uri: Directory or prefix.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    try:
        return storage.list_files(uri, with_etag=False)
    except FileNotFoundError:
        return []


def same_place(one: str, other: str) -> bool:
    """Whether two URIs name the same file, however it is written.

    Args:
        one: URI or local path.
        other: URI or local path.
    """
    if storage.is_remote(one) or storage.is_remote(other):
        return one == other
    return storage.local_path(one).resolve() == storage.local_path(other).resolve()


def newest(uris: Sequence[str]) -> str | None:
    """Return the URI that was written last, of several at the same time the last in order.

    Args:
        uris: Files or objects.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    return max(uris, key=lambda uri: (storage.modified_s(uri), uri), default=None)


def newest_selection_uri(root_uri: str) -> str | None:
    """Return the manifest of the newest selection; None if there is none.

    Versions say which one that is: files lose their times when they are copied, and of a source
    that went back to older files the older selection is the newest. Where there are versions of
    several sources, the record that was written last decides, as they do without versions.

    Args:
        root_uri: The data root.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    newest_of = {version.source_uri: version for version in list_versions(root_uri)}
    # not where they say that they are: the root may have been moved
    by_uri = {
        storage.join(root_uri, "datasets", *version.manifest_uri.split("/")[-2:]): version
        for version in newest_of.values()
    }
    if not by_uri:
        return newest(manifest_uris(root_uri, SELECTIONS))
    uri = next(iter(by_uri)) if len(by_uri) == 1 else newest(list(by_uri))
    name = by_uri[str(uri)].selection.manifest_uri.split("/")[-2]
    return storage.join(root_uri, *SELECTIONS, name, MANIFEST_NAME)


def load_selection(root_uri: str, selection_uri: str | None = None) -> ClipSelection:
    """Return a selection: the one that is named, or that of the newest data set version.

    Args:
        root_uri: The data root.
        selection_uri: Manifest of a selection, or the folder of it; None takes the newest, see
            `newest_selection_uri`.

    Raises:
        DataError: If there is none.
        ManifestError: If its manifest is damaged.
        StorageError: If the store refuses or does not answer.
    """
    if selection_uri is not None and not selection_uri.endswith(".json"):
        selection_uri = storage.join(selection_uri, MANIFEST_NAME)
    found = selection_uri or newest_selection_uri(root_uri)
    selection = storage.load_record(found, ClipSelection) if found else None
    if selection is None:
        where = selection_uri or f"{root_uri} (selections/*/manifest.json)"
        raise DataError(f"no committed selection at {where}; run the data preparation first")
    return selection


def version_of(root_uri: str, selection: ClipSelection) -> int | None:
    """Return the number of the newest data set version with a selection; None if none has it.

    Args:
        root_uri: The data root.
        selection: The committed selection.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    numbers = [
        version.number
        for version in list_versions(root_uri)
        if version.selection.fingerprint == selection.fingerprint
        and version.source_uri == selection.clips.source_uri
    ]
    return max(numbers, default=None)


def iter_records(
    root_uri: str, folder: Sequence[str], kind: type[Record]
) -> Iterator[tuple[str, Record | ManifestError]]:
    """Yield every manifest below a folder with its record, or with what is wrong with it.

    Args:
        root_uri: The data root.
        folder: Segments below the root.
        kind: Class of the records.

    Yields:
        URI, and record or error.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    for uri in manifest_uris(root_uri, folder):
        try:
            record = storage.load_record(uri, kind)
        except ManifestError as error:
            yield uri, error
        else:
            if record is not None:  # else it has been removed since it was listed
                yield uri, record


def good_records(root_uri: str, folder: Sequence[str], kind: type[Record]) -> list[Record]:
    """Return the records of all manifests below a folder that are whole.

    Args:
        root_uri: The data root.
        folder: Segments below the root.
        kind: Class of the records.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    return [item for _, item in iter_records(root_uri, folder, kind) if isinstance(item, kind)]


def known_configs(given: RunConfig | None) -> list[RunConfig]:
    """Return the configurations that may have made a data set: the given one, or the presets.

    Args:
        given: Configuration that a person named; None if none was.
    """
    return [load_config(preset) for preset in PRESETS] if given is None else [given]


def find_recipe(
    root_uri: str, datasets: TokenDatasets, settings: Sequence[TokenizationConfig]
) -> TokenizationRecipe | None:
    """Return what a token data set was made from; its fingerprint proves it.

    Args:
        root_uri: The data root.
        datasets: The committed data sets.
        settings: What to try where no recipe lies beside the manifest.

    Returns:
        The recipe; None if neither a recipe there nor the settings have the fingerprint.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    recipe = read_recipe(datasets)
    if isinstance(recipe, TokenizationRecipe):
        return recipe
    candidates = (
        TokenizationRecipe(selection=selection, visual_tokenizer=tokenizer, settings=part)
        for selection in good_records(root_uri, SELECTIONS, ClipSelection)
        for tokenizer in good_records(root_uri, VISUAL_TOKENIZERS, TokenizerRef)
        for part in settings
    )
    return next((item for item in candidates if item.fingerprint == datasets.fingerprint), None)


def models_of(
    models: Sequence[ExportedModel], tokens_uri: str
) -> tuple[list[ExportedModel], list[ExportedModel]]:
    """Return the models that were trained on a token data set, and those that descend from them.

    Args:
        models: All exported models of a data root; one that is not among them ends a descent.
        tokens_uri: Manifest of the token data sets.

    Returns:
        Models whose last stage was trained on it; others whose weights began with those of one of
        these, or of one that descends from it.
    """
    trained = [model for model in models if model.tokens_uri == tokens_uri]
    descendants: list[ExportedModel] = []
    left = [model for model in models if model.tokens_uri != tokens_uri]
    parents = trained
    while parents:
        parents = [model for model in left if any(_began_with(model, item) for item in parents)]
        descendants += parents
        left = [model for model in left if model not in parents]
    return trained, descendants


def _began_with(model: ExportedModel, parent: ExportedModel) -> bool:
    # older releases recorded only the start of the last stage
    start = model.started_from_uri or model.checkpoint.parent_uri
    if start is None:
        return False
    place, folder = storage.absolute_uri(start), storage.absolute_uri(parent.directory_uri)
    return place == folder or place.startswith(f"{folder}/")  # its `transformer/` alone


def read_recipe(datasets: TokenDatasets) -> TokenizationRecipe | str | None:
    """Return the recipe beside the manifest of a token data set.

    Args:
        datasets: The committed data sets.

    Returns:
        The recipe, or what is wrong with it, or None if there is none, as older code wrote none.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    uri = recipe_uri(datasets)
    try:
        recipe = storage.load_record(uri, TokenizationRecipe)
    except ManifestError as error:
        return str(error)
    if recipe is not None and recipe.fingerprint != datasets.fingerprint:
        return f"has fingerprint {recipe.fingerprint}, the data set {datasets.fingerprint}"
    return recipe


def recipe_difference(recipe: TokenizationRecipe) -> str | None:
    """Return in what a recipe differs from the records that it repeats; None if it does not.

    Records that are missing or damaged say nothing about the recipe.

    Args:
        recipe: The recipe of a token data set.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    for part in (recipe.selection, recipe.visual_tokenizer):
        try:
            committed = storage.load_record(part.manifest_uri, type(part))
        except ManifestError:
            continue  # named where these are verified
        if committed not in (None, part):
            return f"differs from {part.manifest_uri}: one of both is damaged"
    return None


def missing_parts(recipe: TokenizationRecipe) -> list[str]:
    """Return the URIs of the records that a recipe repeats and that are gone.

    Args:
        recipe: The recipe of a token data set.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    parts = (recipe.selection.manifest_uri, recipe.visual_tokenizer.manifest_uri)
    return [uri for uri in parts if not storage.exists(uri)]


def recipe_uri(datasets: TokenDatasets) -> str:
    """Return where the recipe of a token data set is.

    Args:
        datasets: The committed data sets.
    """
    return storage.join(datasets.manifest_uri.rpartition("/")[0], RECIPE_NAME)
