"""Read logs, write tables and pictures. The trainer imports the writer of logs and no reader."""
