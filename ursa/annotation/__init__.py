"""The annotation step: optional captions and scores of clips. How to: docs/annotation.md."""
