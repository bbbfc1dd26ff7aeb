"""Ray: placement groups, actors that host the roles, and what a cluster lacks."""
