# Streams one answer. ruby client.rb ADDRESS PROMPT
require "octavo/inference/v1/generation_services_pb"

Api = Octavo::Inference::V1

address, prompt = ARGV
stub = Api::GenerationService::Stub.new(address, :this_channel_is_insecure, timeout: 120)
message = Api::Message.new(role: "user", parts: [Api::Part.new(text: prompt)])
generation = Api::Generation.new(
  model: "smollm2-135m-instruct",
  chat: Api::Chat.new(messages: [message]),
  sampling: Octavo::Common::V1::SamplingParams.new(temperature: 0)
)
begin
  stub.generate_stream(Api::GenerateStreamRequest.new(generation: generation)).each do |response|
    print response.event.delta.text if response.event.delta
    puts "\n#{response.event.completed.usage.output_tokens} tokens" if response.event.completed
  end
rescue GRPC::BadStatus => e
  abort "#{e.code}: #{e.details}" # e.to_rpc_status.details says what to change
end
