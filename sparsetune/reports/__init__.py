"""What people look at: tables, the page and its pictures, W&B reports, frames, files."""
