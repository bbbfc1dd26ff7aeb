"""The commands of `sgmd`: each reads its arguments, calls one function, shows the result."""
