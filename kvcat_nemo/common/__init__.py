"""What every room needs: whole files and folders, bounds of sizes, child processes. Needs the standard library alone."""
