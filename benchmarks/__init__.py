"""Every figure that README and docs quote is printed by a command in here."""
