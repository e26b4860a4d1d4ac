"""A folder of prompt files over HTTP, and a page to try it (extra `lpt[serve]`)."""
