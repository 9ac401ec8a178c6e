"""Who is there: the group, the reduction over its workers, its agent, its signals."""
