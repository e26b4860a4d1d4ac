"""How many planted label errors an audit finds, group by group."""
