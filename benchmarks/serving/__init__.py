"""Many tasks on one backbone: what mixing them costs, their memory, and how well images find their task."""
