"""Train the text tokenizer on the captions of the selected clips, as a step."""

from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, ClipSelection, TokenizerRef
from ursa.config import RunConfig, fingerprint
from ursa.data.clips import iter_selection
from ursa.tokenizers.text import load_text_tokenizer, motion_prompt, train_text_tokenizer


def fit_text_tokenizer(
    selection: ClipSelection, config: RunConfig, *, output_uri: str
) -> TokenizerRef:
    """Train a byte-level BPE on training captions, or commit the one that the config points to.

    Args:
        selection: Clips with captions; only the training split is read.
        config: The run; `text_tokenizer` matters.
        output_uri: Root of all data of the run.

    Returns:
        The committed tokenizer with its ids per caption (`tokens_per_caption`).

    Raises:
        ConfigError: If `directory_uri` holds no text tokenizer.
        ShardFormatError: If a table of the clips is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    settings = config.text_tokenizer
    captions = {
        item.clip.caption or "" for item in iter_selection(selection) if item.split == "train"
    }
    texts = sorted({motion_prompt(caption, 0.0) for caption in captions} | captions)
    decisive = settings.model_dump(mode="json", exclude={"refit_growth"})
    print_ = fingerprint(SCHEMA_VERSION, "text", decisive, texts)
    folder_uri = storage.join(output_uri, "tokenizers", "text", print_[:32])
    manifest_uri = storage.join(folder_uri, "manifest.json")
    done = storage.load_record(manifest_uri, TokenizerRef)
    if done is not None:
        return done
    if settings.directory_uri is not None:
        with storage.local_directory(settings.directory_uri) as folder:
            tokenizer = load_text_tokenizer(folder)
    else:
        tokenizer = train_text_tokenizer(texts, vocab_size=settings.vocab_size)
    lengths = tokenizer.encode(texts, max_length=settings.max_prompt_length)
    used = float((lengths != tokenizer.pad_id).sum() / max(1, len(texts)))
    with storage.scratch_directory("tokenizer") as scratch:
        tokenizer.save(scratch)
        directory_uri = storage.unique_place(folder_uri, "model")
        hashes = storage.upload_directory(scratch, directory_uri)
    return storage.commit_record(
        manifest_uri,
        TokenizerRef(
            manifest_uri=manifest_uri,
            directory_uri=directory_uri,
            kind="text",
            vocab_size=tokenizer.vocab_size,
            metrics={"tokens_per_caption": used},
            sha256=hashes,
            fingerprint=print_,
        ),
    )
