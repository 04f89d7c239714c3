"""The client's side of split learning."""
