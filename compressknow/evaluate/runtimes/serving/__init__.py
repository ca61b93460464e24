"""A model behind an address: requests that are tried again, what each kind of server tells, and its answers."""
