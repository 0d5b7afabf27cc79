-- One request after the other from a file of paths; %d in the body becomes a number that is never the same again.
local paths, at, number = {}, 0, 0
local method, body

function init(args)
  for line in io.lines(args[1]) do paths[#paths + 1] = line end
  method, body, number = args[2], args[3], tonumber(args[4])
  if body == "" then body = nil end
end

function request()
  at = at % #paths + 1
  number = number + 1
  local sent = body and body:gsub("%%d", tostring(number))
  return wrk.format(method, paths[at], { ["content-type"] = "application/json" }, sent)
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %d %d\n", summary.requests, summary.duration, e.status,
    e.connect + e.read + e.write + e.timeout))
end
