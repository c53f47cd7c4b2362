-- How the gates of a lane stand. Changes nothing.
-- KEYS  1 lane
-- Returns two lists, see permits.show.
return permits().show(now_ms())
