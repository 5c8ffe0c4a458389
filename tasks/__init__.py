"""kick's own suites, registered like anyone else's through the entry-point group `kick.suites`."""
