"""Where videos come from: trees, manifests, tar files, object stores and https addresses."""
