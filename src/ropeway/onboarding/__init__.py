"""`ropeway init`: look at data, base and machine, and write a profile in which every derived value says why."""
