"""What makes the book: chapters and how they are run, their claims, sizes, records and pages."""
