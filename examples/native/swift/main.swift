// Generate from token ids on a Mac. The folder payload/native of the artifact, with module.modulemap beside arkinfer.h:
//
//     swiftc main.swift -I m.ark/payload/native -L m.ark/payload/native -Xlinker -rpath -Xlinker m.ark/payload/native
//     ./main m.ark 5 9 300
import Arkinfer

struct Failure: Error { let text = String(cString: ark_error()) }

func check(_ status: ark_status) throws { if status != ARK_OK { throw Failure() } }

var engine: OpaquePointer?
var session: OpaquePointer?
var options = ark_options()
let prompt = CommandLine.arguments.dropFirst(2).compactMap(Int32.init)
try check(ark_open(CommandLine.arguments[1], &options, &engine))
try check(ark_session_open(engine, 1024, &session))

var generation = ark_generation()
generation.limit = 64
generation.sampling.temperature = 0.7
generation.sampling.seed = 1
var answer = [Int32](repeating: 0, count: generation.limit)
var count = 0
try check(ark_generate(session, prompt, prompt.count, &generation, &answer, &count))
print(answer.prefix(count))

ark_session_close(session)
ark_close(engine)
