"""What reads many cells or stands beside them; nothing here is part of a cell."""
