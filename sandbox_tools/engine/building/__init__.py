"""What new sandboxes are made from: root file systems, made, fitted out, warmed and collected."""
