"""kick's own compressors, registered like anyone else's through the entry-point group `kick.compressors`."""
